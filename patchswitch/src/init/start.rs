//! Starting scripts: `/etc/patchswitch/start.d/NN-name`, in the order of their names (patent Fig. 11).

use std::fs;
use std::io;
use std::time::Duration;

use super::paths::Paths;
use super::supervisor::{Ending, Supervisor, Task, program};
use super::{report, say};

/// How long one script may take; one of them may apply the patches. The host has a limit of its own for the boot.
const LIMIT: Duration = Duration::from_secs(3600);

/// A script that did not end well.
#[derive(Debug)]
pub(super) struct Failed {
    /// Its name.
    pub(super) script: String,
    /// How it ended; none if it could not be started.
    pub(super) ending: Option<Ending>,
}

/// The scripts among these names, in order. What does not look like one (`NN-name`) is passed over, as files that
/// package managers leave beside a changed one.
pub(super) fn scripts(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut scripts: Vec<String> = names.into_iter().filter(|name| own_name(name).is_some()).collect();
    scripts.sort_unstable();
    scripts
}

/// A script's name without its number.
fn own_name(script: &str) -> Option<&str> {
    let (number, name) = script.split_once('-')?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    let left_over = [".dpkg-old", ".dpkg-new", ".dpkg-dist", ".dpkg-tmp", ".bak", ".new"];
    let good = number.len() >= 2
        && number.bytes().all(|b| b.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(plain)
        && !left_over.iter().any(|end| name.ends_with(end));
    good.then_some(name)
}

fn is_masked(script: &str, masks: &[String]) -> bool {
    masks.iter().any(|mask| mask == script || own_name(script) == Some(mask))
}

/// Runs all scripts but the masked ones; the first that does not end well is the last that is run.
pub(super) fn run(
    paths: &Paths,
    masks: &[String],
    supervisor: &mut Supervisor,
) -> io::Result<Result<(), Failed>> {
    let (masked, wanted): (Vec<_>, Vec<_>) = list(paths)?.into_iter().partition(|s| is_masked(s, masks));
    for script in masked {
        say(&format!("starting script {script} is masked"));
    }
    run_these(paths, wanted, supervisor)
}

/// Runs the scripts that were masked under these names, after the switch.
pub(super) fn unmask(paths: &Paths, names: &[String]) -> u8 {
    let result = Supervisor::new().and_then(|mut supervisor| {
        let wanted = list(paths)?.into_iter().filter(|s| is_masked(s, names)).collect();
        run_these(paths, wanted, &mut supervisor)
    });
    match result {
        Ok(Ok(())) => 0,
        Ok(Err(failed)) => {
            say(&failed.to_string());
            failed.code()
        }
        Err(error) => {
            say(&format!("failed to run starting scripts: {error}"));
            1
        }
    }
}

fn list(paths: &Paths) -> io::Result<Vec<String>> {
    match fs::read_dir(paths.scripts()) {
        Ok(entries) => {
            let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name())).collect();
            Ok(scripts(names?.into_iter().filter_map(|name| name.into_string().ok())))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn run_these(
    paths: &Paths,
    scripts: Vec<String>,
    supervisor: &mut Supervisor,
) -> io::Result<Result<(), Failed>> {
    let boot_id = report::boot_id(paths);
    for script in scripts {
        let mut command = program(&paths.scripts().join(&script));
        command.env("PATCHSWITCH_BOOT_ID", &boot_id);
        let ending = match supervisor.run(Task::new(command).limit(LIMIT)) {
            Ok(Ending::Exited(0)) => continue,
            Ok(ending) => Some(ending),
            Err(error) => {
                say(&format!("failed to start {script}: {error}"));
                None
            }
        };
        return Ok(Err(Failed { script, ending }));
    }
    Ok(Ok(()))
}

impl Failed {
    /// An exit status that says the same.
    pub(super) fn code(&self) -> u8 {
        self.ending.map_or(126, Ending::code)
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.ending {
            Some(ending) => write!(f, "starting script {} {ending}", self.script),
            None => write!(f, "starting script {} could not be started", self.script),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_taken_in_the_order_of_their_names_and_nothing_else_is() {
        let names = [
            "20-b",
            "10-a",
            "100-c",
            "README",
            "5-x",
            "30-",
            "aa-x",
            "30-x~",
            "30-x.dpkg-old",
            "-x",
            "10-a b",
            "30-app.sh",
        ];
        let taken = scripts(names.map(ToOwned::to_owned));
        assert_eq!(taken, ["10-a", "100-c", "20-b", "30-app.sh"], "by bytes, as ls and run-parts have it");
    }

    #[test]
    fn masks_name_a_script_with_or_without_its_number() {
        let masks = ["cron".to_owned(), "40-queue".to_owned()];
        for (script, masked) in
            [("30-cron", true), ("40-queue", true), ("41-queue", false), ("30-cron2", false)]
        {
            assert_eq!(is_masked(script, &masks), masked, "{script}");
        }
    }
}
