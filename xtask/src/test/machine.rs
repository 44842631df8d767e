//! Tests inside the test machine: nextest runs on the host, and its target runner (`xtask in-vm`) takes each test
//! there.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use patchswitch_guest::{End, Request};
use serde::{Deserialize, Serialize};

use super::nextest::{self, Count};
use crate::build;
use crate::cache::{Cache, say};
use crate::command::{Tool, last_lines};
use crate::vm::agent;
use crate::vm::boot::{Config, Disks, Vm};
use crate::vm::kernel::Series;
use crate::vm::payload::Payload;

/// Nextest kills a test that hangs; this is for the case that nextest itself is gone.
const TEST_LIMIT: Duration = Duration::from_secs(1800);
/// How often a test may have the machine reset before it is taken for a loop.
const RESETS_MAX: usize = 20;
const SOCKET: &str = "PATCHSWITCH_VM_SOCKET";
const CONTROL: &str = "PATCHSWITCH_VM_CONTROL";
const PHASE: &str = "PATCHSWITCH_VM_PHASE";
const BPF_OBJECT: &str = "PATCHSWITCH_BPF_OBJECT";
const OBJECT_FILE: &str = "patchswitch.bpf.o";

/// What a test's runner says to the owner of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Word {
    /// A test begins. The machine is started anew if the last one failed or was killed: what that one left behind is
    /// not this one's fault.
    Begin,
    /// The test passed.
    Passed,
    /// The machine ended before the test did, or does not answer.
    Dead,
    /// There are no more tests.
    End,
}

/// What the owner answers.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    /// After [`Word::Dead`]: what the test wrote before it had the machine reset; empty if it did not.
    note: String,
    /// After [`Word::Dead`]: the end of the kernel's log.
    console: String,
    /// Why the machine did not start again.
    error: Option<String>,
}

/// Runs the test targets `names` in a machine with a kernel of this series.
pub(crate) fn run(series: &Series, names: &[String], rest: &[String]) -> Result<Count> {
    if names.is_empty() {
        bail!("there are no such tests");
    }
    let cache = Cache::open()?;
    let payload = payload(&cache, names)?;
    let config = Config { payload: Some(payload.dir().to_owned()), ..Config::new(series.clone()) };
    let vm = Vm::boot(&cache, &config)?;
    say(&format!("the tests run on Linux {}", vm.release()));
    // Beside the payload, not in it: it is removed with it.
    let control = payload.dir().with_extension("control");
    let listener = UnixListener::bind(&control).with_context(|| control.display().to_string())?;
    let environment = [
        (SOCKET, vm.socket().display().to_string()),
        (CONTROL, control.display().to_string()),
        ("PATCHSWITCH_KERNEL", series.to_string()),
    ];
    let owner = thread::spawn(move || Owner { vm, dirty: false }.serve(&listener));
    let runner =
        serde_json::to_string(&[std::env::current_exe()?.display().to_string(), "in-vm".to_owned()])?;
    let mut selection = vec![
        "--config".to_owned(),
        format!("target.{}.runner={runner}", crate::paths::TARGET),
        "-p".to_owned(),
        "patchswitch-tests".to_owned(),
    ];
    for name in names {
        selection.extend(["--test".to_owned(), name.clone()]);
    }
    let count = nextest::run("vm", &selection, &environment, rest);
    ask(&control, Word::End).context("failed to end the test machine")?;
    if owner.join().is_err() {
        bail!("the owner of the test machine panicked");
    }
    count
}

/// The test binaries, the programs that they start, and what these work on.
fn payload(cache: &Cache, names: &[String]) -> Result<Payload> {
    let payload = Payload::new(cache)?;
    for (_, file) in build::tests(names)? {
        payload.add(&file)?;
    }
    payload.add_programs()?;
    payload.add_artifacts(cache)?;
    if names.iter().any(|name| name == "vm") {
        payload.add_systemd_root(cache)?;
        payload.add(&build::example("whole_job")?)?;
    }
    if let Some(object) = std::env::var_os(BPF_OBJECT) {
        payload.add_as(Path::new(&object), OBJECT_FILE)?;
    }
    Ok(payload)
}

/// Owns the machine while the tests run.
struct Owner {
    vm: Vm,
    /// A test has begun and not said that it passed.
    dirty: bool,
}

impl Owner {
    fn serve(mut self, listener: &UnixListener) {
        for client in listener.incoming() {
            match client.map_err(Into::into).and_then(|client| self.attend(client)) {
                Ok(Word::End) => break,
                Ok(_) => {}
                Err(error) => say(&format!("failed to answer a test: {error:#}")),
            }
        }
        if let Err(error) = self.vm.power_off() {
            say(&format!("{error:#}"));
        }
    }

    fn attend(&mut self, mut client: UnixStream) -> Result<Word> {
        let word = serde_json::from_reader(&mut client)?;
        let answer = match word {
            Word::Begin => {
                let again = if self.dirty { self.vm.boot_again(Disks::Empty) } else { Ok(()) };
                self.dirty = true;
                Answer { error: again.err().map(|error| format!("{error:#}")), ..Answer::default() }
            }
            Word::Passed => {
                self.dirty = false;
                Answer::default()
            }
            Word::Dead => {
                let console = last_lines(&self.vm.console(), 40);
                let note = self.vm.take_reset_note()?;
                self.dirty = !note.is_empty();
                let disks = if note.is_empty() { Disks::Empty } else { Disks::Kept };
                let error = self.vm.boot_again(disks).err().map(|error| format!("{error:#}"));
                Answer { note, console, error }
            }
            Word::End => Answer::default(),
        };
        client.write_all(&serde_json::to_vec(&answer)?)?;
        Ok(word)
    }
}

fn ask(control: &Path, word: Word) -> Result<Answer> {
    let mut connection = UnixStream::connect(control).context("nobody owns the test machine")?;
    connection.write_all(&serde_json::to_vec(&word)?)?;
    connection.shutdown(Shutdown::Write)?;
    Ok(serde_json::from_reader(&mut connection)?)
}

/// `xtask in-vm BINARY ARGUMENT…`: runs a test binary in the machine that `SOCKET` names, where it lies in `/payload`.
pub(crate) fn in_vm(arguments: &[String]) -> Result<ExitCode> {
    let (binary, rest) = arguments.split_first().context("no test binary")?;
    if rest.iter().any(|argument| argument == "--list") {
        // The list does not depend on the kernel; the binary is static.
        return Err(Tool::new(binary).args(rest).into_inner().exec().into());
    }
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let (socket, control) = (PathBuf::from(variable(SOCKET)?), PathBuf::from(variable(CONTROL)?));
    let file = Path::new(binary).file_name().context("no file name")?.to_string_lossy();
    let mut argv = vec![format!("/payload/{file}")];
    argv.extend_from_slice(rest);
    let limit_ms = u64::try_from(TEST_LIMIT.as_millis())?;
    let mut request = Request { argv, env: environment(), dir: "/tmp".to_owned(), limit_ms, stdin: false };
    if let Some(error) = ask(&control, Word::Begin)?.error {
        bail!("the last test left a machine that does not start again: {error}");
    }
    for _ in 0..RESETS_MAX {
        let error = match agent::run(&socket, &request, agent::to_terminal) {
            Ok(end) => {
                if end == End::Code(0) {
                    ask(&control, Word::Passed)?;
                }
                return Ok(ExitCode::from(u8::try_from(end.exit_code()).unwrap_or(u8::MAX)));
            }
            Err(error) => error,
        };
        let answer = ask(&control, Word::Dead)?;
        if answer.error.is_some() || answer.note.is_empty() {
            let again = answer.error.unwrap_or_default();
            bail!("{error:#}; the end of the kernel's log:\n{}\n{again}", answer.console);
        }
        request.env.insert(PHASE.to_owned(), answer.note);
    }
    bail!("the test had the machine reset {RESETS_MAX} times")
}

/// What a test of the host's environment may see in the machine.
fn environment() -> BTreeMap<String, String> {
    let wanted = |name: &str| {
        name.starts_with("NEXTEST")
            || name.starts_with("PATCHSWITCH_")
            || name.starts_with("RUST_") && name != "RUST_TEST_THREADS"
    };
    let mut all: BTreeMap<String, String> = std::env::vars().filter(|(name, _)| wanted(name)).collect();
    for name in [SOCKET, CONTROL, "PATCHSWITCH_KVM", "PATCHSWITCH_KEEP"] {
        all.remove(name);
    }
    all.insert("PATCHSWITCH_BIN_DIR".to_owned(), "/payload".to_owned());
    all.insert("PATCHSWITCH_ARTIFACTS".to_owned(), "/payload/artifacts".to_owned());
    if let Some(object) = all.get_mut(BPF_OBJECT) {
        *object = format!("/payload/{OBJECT_FILE}");
    }
    all
}
