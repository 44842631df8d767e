//! Tests inside the test machine: nextest runs on the host, and its target runner (`xtask in-vm`) takes each test
//! there.
//!
//! There are as many machines as the build machine has processors for. Each has its own disks and runs one test at a
//! time; a test gets whichever is free.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use patchswitch_guest::{End, Request};
use serde::{Deserialize, Serialize};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

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
const CONTROL: &str = "PATCHSWITCH_VM_CONTROL";
const PHASE: &str = "PATCHSWITCH_VM_PHASE";
const BPF_OBJECT: &str = "PATCHSWITCH_BPF_OBJECT";
const OBJECT_FILE: &str = "patchswitch.bpf.o";

/// What a test's runner says to the owner of the machines. That it connects means that a test begins, and that it
/// hangs up means that the test has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Word {
    /// The test passed: it left nothing behind that another one could stumble over.
    Passed,
    /// The machine ended before the test did, or does not answer.
    Dead,
    /// The test is being ended because it took too long.
    Hung,
}

/// What the owner answers.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    /// At first: the socket of the machine that the test has for itself until it ends.
    socket: PathBuf,
    /// After [`Word::Dead`]: what the test wrote before it had the machine reset; empty if it did not.
    note: String,
    /// After [`Word::Dead`]: the end of the kernel's log; after [`Word::Hung`]: what goes on in the machine.
    console: String,
    /// Why the machine did not start.
    error: Option<String>,
}

/// Runs the test targets `names` in machines with a kernel of this series; `heard` gets each line of nextest's.
pub(crate) fn run(
    series: &Series,
    names: &[String],
    rest: &[String],
    heard: &mut dyn FnMut(&str),
) -> Result<Count> {
    if names.is_empty() {
        bail!("there are no such tests");
    }
    let cache = Cache::open()?;
    let payload = payload(&cache, names)?;
    let config = Config { payload: Some(payload.dir().to_owned()), ..Config::new(series.clone()) };
    let machines = machines_max();
    let pool = Arc::new(Pool::new(cache, config, machines)?);
    // Beside the payload, not in it: it is removed with it.
    let control = payload.dir().with_extension("control");
    let listener = UnixListener::bind(&control).with_context(|| control.display().to_string())?;
    let environment = [
        (CONTROL, control.display().to_string()),
        ("PATCHSWITCH_KERNEL", series.to_string()),
        // Not as an option: the user may give that one.
        ("NEXTEST_TEST_THREADS", machines.to_string()),
    ];
    let runner =
        serde_json::to_string(&[std::env::current_exe()?.display().to_string(), "in-vm".to_owned()])?;
    let mut selection = vec![
        "--config".to_owned(),
        format!("target.{}.runner={runner}", crate::paths::TARGET),
        "--workspace".to_owned(),
    ];
    for name in names {
        selection.extend(["--test".to_owned(), name.clone()]);
    }
    let owner = {
        let pool = Arc::clone(&pool);
        thread::spawn(move || pool.serve(&listener))
    };
    let count = nextest::run("vm", &selection, &environment, rest, heard);
    pool.close();
    UnixStream::connect(&control).context("failed to end the test machines")?;
    if owner.join().is_err() {
        bail!("the owner of the test machines panicked");
    }
    count
}

/// How many machines run side by side. Each keeps one processor busy; more than two were never tried.
fn machines_max() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(2)
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

/// Owns the machines while the tests run. A test has one for itself, so no test knows that there are others.
struct Pool {
    cache: Cache,
    config: Config,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Machine>,
    /// The tests that have a machine, by its number.
    lent: BTreeMap<usize, UnixStream>,
    over: bool,
}

struct Machine {
    number: usize,
    /// None until a test needs it, and when it did not start.
    vm: Option<Vm>,
    /// A test has begun and not said that it passed. The machine is started anew before the next one: what this one
    /// left behind is not that one's fault.
    dirty: bool,
}

impl Pool {
    /// Starts the first machine; the others start when there is something for them to do.
    fn new(cache: Cache, config: Config, machines_max: usize) -> Result<Self> {
        let vm = Vm::boot(&cache, &config)?;
        say(&format!("the tests run on Linux {}, in up to {machines_max} machines at a time", vm.release()));
        let mut idle: Vec<Machine> =
            (1..machines_max).rev().map(|number| Machine { number, vm: None, dirty: false }).collect();
        idle.push(Machine { number: 0, vm: Some(vm), dirty: false });
        let state = Mutex::new(State { idle, ..State::default() });
        Ok(Self { cache, config, state, changed: Condvar::new() })
    }

    /// Attends to tests until [`Pool::close`], then ends the machines.
    fn serve(&self, listener: &UnixListener) {
        thread::scope(|scope| {
            for client in listener.incoming() {
                if self.state().over {
                    break;
                }
                scope.spawn(move || {
                    if let Err(error) = client.map_err(Into::into).and_then(|client| self.attend(&client)) {
                        say(&format!("failed to answer a test: {error:#}"));
                    }
                });
            }
        });
        for machine in std::mem::take(&mut self.state().idle) {
            if let Err(error) = machine.vm.map_or(Ok(()), Vm::power_off) {
                say(&format!("{error:#}"));
            }
        }
    }

    /// No more tests: those that are still there, because nextest was killed, lose their machines.
    fn close(&self) {
        let mut state = self.state();
        state.over = true;
        for client in state.lent.values() {
            // It may have hung up itself.
            let _gone = client.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attend(&self, client: &UnixStream) -> Result<()> {
        let Some(mut machine) = self.lend(client)? else { return Ok(()) };
        let outcome = self.converse(&mut machine, client);
        let mut state = self.state();
        state.lent.remove(&machine.number);
        state.idle.push(machine);
        self.changed.notify_one();
        outcome
    }

    /// Waits for a machine; none if the run is over.
    fn lend(&self, client: &UnixStream) -> Result<Option<Machine>> {
        let client = client.try_clone()?;
        let mut state = self.state();
        loop {
            if state.over {
                return Ok(None);
            }
            if let Some(machine) = state.idle.pop() {
                state.lent.insert(machine.number, client);
                return Ok(Some(machine));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn converse(&self, machine: &mut Machine, client: &UnixStream) -> Result<()> {
        let ready = machine.make_ready(&self.cache, &self.config);
        let socket = machine.vm.as_ref().map(Vm::socket).unwrap_or_default();
        write_line(client, &Answer { socket, error: said(ready), ..Answer::default() })?;
        let mut lines = BufReader::new(client.try_clone()?).lines();
        while let Some(line) = lines.next().transpose()? {
            let answer = match serde_json::from_str(&line)? {
                Word::Passed => {
                    machine.dirty = false;
                    Answer::default()
                }
                Word::Dead => machine.died()?,
                Word::Hung => {
                    let console = machine.vm.as_ref().map(Vm::what_goes_on).unwrap_or_default();
                    Answer { console, ..Answer::default() }
                }
            };
            write_line(client, &answer)?;
        }
        Ok(())
    }
}

impl Machine {
    /// Makes it fit for a test.
    fn make_ready(&mut self, cache: &Cache, config: &Config) -> Result<()> {
        match &mut self.vm {
            None => self.vm = Some(Vm::boot(cache, config)?),
            Some(vm) if self.dirty => vm.boot_again(Disks::Empty)?,
            Some(_) => {}
        }
        self.dirty = true;
        Ok(())
    }

    /// Finds out whether its end was wanted, and if so starts it again.
    fn died(&mut self) -> Result<Answer> {
        let vm = self.vm.as_mut().context("the test has no machine")?;
        let console = last_lines(&vm.console(), 40);
        let note = vm.take_reset_note()?;
        // Without a note the test is over, and the next one finds a machine that has to be started.
        let error = if note.is_empty() { None } else { said(vm.boot_again(Disks::Kept)) };
        Ok(Answer { note, console, error, ..Answer::default() })
    }
}

fn said(result: Result<()>) -> Option<String> {
    result.err().map(|error| format!("{error:#}"))
}

/// A test's end of its connection to the owner of the machines.
struct Lease {
    connection: BufReader<UnixStream>,
}

impl Lease {
    /// Waits for a machine.
    fn begin(control: &Path) -> Result<(Self, Answer)> {
        let connection = UnixStream::connect(control).context("nobody owns the test machines")?;
        let mut lease = Self { connection: BufReader::new(connection) };
        let answer = lease.answer()?;
        Ok((lease, answer))
    }

    fn ask(&mut self, word: Word) -> Result<Answer> {
        write_line(self.connection.get_ref(), &word)?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self.connection.read_line(&mut line)? == 0 {
            bail!("the owner of the test machines hung up");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

fn write_line(mut to: &UnixStream, value: &impl Serialize) -> Result<()> {
    // In JSON a line's end inside a text is written as two other characters.
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(to.write_all(&line)?)
}

/// `xtask in-vm BINARY ARGUMENT…`: runs a test binary in a machine of the owner that `CONTROL` names; there it lies in
/// `/payload`.
pub(crate) fn in_vm(arguments: &[String]) -> Result<ExitCode> {
    let (binary, rest) = arguments.split_first().context("no test binary")?;
    if rest.iter().any(|argument| argument == "--list") {
        // The list does not depend on the kernel; the binary is static.
        return Err(Tool::new(binary).args(rest).into_inner().exec().into());
    }
    let control = PathBuf::from(std::env::var(CONTROL).with_context(|| format!("{CONTROL} is not set"))?);
    let file = Path::new(binary).file_name().context("no file name")?.to_string_lossy();
    let mut argv = vec![format!("/payload/{file}")];
    argv.extend_from_slice(rest);
    let limit_ms = u64::try_from(TEST_LIMIT.as_millis())?;
    let mut request = Request { argv, env: environment(), dir: "/tmp".to_owned(), limit_ms, stdin: false };
    let (lease, Answer { socket, error, .. }) = Lease::begin(&control)?;
    if let Some(error) = error {
        bail!("the machine for this test does not start: {error}");
    }
    let lease = Arc::new(Mutex::new(lease));
    tell_before_the_end(Arc::clone(&lease))?;
    let ask = |word| lease.lock().unwrap_or_else(PoisonError::into_inner).ask(word);
    for _ in 0..RESETS_MAX {
        let error = match agent::run(&socket, &request, agent::to_terminal) {
            Ok(end) => {
                if end == End::Code(0) {
                    ask(Word::Passed)?;
                }
                return Ok(ExitCode::from(u8::try_from(end.exit_code()).unwrap_or(u8::MAX)));
            }
            Err(error) => error,
        };
        let answer = ask(Word::Dead)?;
        if answer.error.is_some() || answer.note.is_empty() {
            let again = answer.error.unwrap_or_default();
            bail!("{error:#}; the end of the kernel's log:\n{}\n{again}", answer.console);
        }
        request.env.insert(PHASE.to_owned(), answer.note);
    }
    bail!("the test had the machine reset {RESETS_MAX} times")
}

/// When nextest ends this process because its test takes too long, the machine says what it does before it is lost.
fn tell_before_the_end(lease: Arc<Mutex<Lease>>) -> Result<()> {
    let mut signals = Signals::new([SIGTERM]).context("failed to wait for signals")?;
    thread::spawn(move || {
        let _ = signals.forever().next();
        match lease.lock().unwrap_or_else(PoisonError::into_inner).ask(Word::Hung) {
            Ok(answer) => say(&format!("the test is ended; the machine:\n{}", answer.console)),
            Err(error) => say(&format!("the test is ended, and its machine is gone: {error:#}")),
        }
        std::process::exit(128 + SIGTERM)
    });
    Ok(())
}

/// What a test of the host's environment may see in the machine.
fn environment() -> BTreeMap<String, String> {
    let wanted = |name: &str| {
        name.starts_with("NEXTEST")
            || name.starts_with("PATCHSWITCH_")
            || name.starts_with("RUST_") && name != "RUST_TEST_THREADS"
    };
    let mut all: BTreeMap<String, String> = std::env::vars().filter(|(name, _)| wanted(name)).collect();
    for name in [CONTROL, "PATCHSWITCH_KVM", "PATCHSWITCH_KEEP"] {
        all.remove(name);
    }
    all.insert("PATCHSWITCH_BIN_DIR".to_owned(), "/payload".to_owned());
    all.insert("PATCHSWITCH_ARTIFACTS".to_owned(), "/payload/artifacts".to_owned());
    if let Some(object) = all.get_mut(BPF_OBJECT) {
        *object = format!("/payload/{OBJECT_FILE}");
    }
    all
}
