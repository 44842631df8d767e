//! The jobs: what is patched, what happens meanwhile, what must come of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use patchswitch_load::clock;
use patchswitch_load::report::Window;
use serde_json::Value;

use crate::content;
use crate::ground::{FIRST, SECOND, SERVICE, configuration};
use crate::measure::Record;
use crate::product::{Ended, Product};
use crate::report::Expected;
use crate::story::Story;
use crate::traffic::Load;

/// How long the service is left alone after a job, as a part of it: what a job breaks may show late.
const SETTLE: Duration = Duration::from_secs(2);
/// From the flip until the long downloads may come to their end.
const DOWNLOAD_AFTER_FLIP: Duration = Duration::from_secs(3);
/// Phases after which new flows go to the patched side.
const AFTER_FLIP: [&str; 2] = ["observe", "drain"];
/// The phases of a job, in their order.
pub(crate) const PHASES: [&str; 15] = [
    "plan",
    "clone",
    "scan",
    "inject",
    "boot",
    "patch",
    "restart",
    "verify",
    "arm",
    "take_over",
    "observe",
    "drain",
    "retire",
    "commit",
    "give_back",
];

/// One of the five.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    number: u8,
    title: &'static str,
    /// A script, or the packages.
    script: Option<&'static str>,
    commit: bool,
    rollback: bool,
    notice: bool,
    pub(crate) expected: Expected,
}

/// A switch whose old side's replies are left as they are.
const NEGATIVE: Case = Case {
    number: 6,
    title: "for comparison, a switch without the notice: who asked the old side by UDP hears nothing any more",
    script: Some(content::HARMLESS),
    commit: true,
    rollback: false,
    notice: false,
    expected: Expected { exit_code: 0, flips: 1, changes_version: false, breaks_requests: false },
};

const CASES: [Case; 5] = [
    Case {
        number: 1,
        title: "the security update of nginx, to the end: clone, patch, take over, drain, commit",
        script: None,
        commit: true,
        rollback: false,
        notice: true,
        expected: Expected { exit_code: 0, flips: 1, changes_version: true, breaks_requests: false },
    },
    Case {
        number: 2,
        title: "a patch that fails half-way on the clone",
        script: Some(content::FAILS),
        commit: true,
        rollback: false,
        notice: true,
        expected: Expected { exit_code: 20, flips: 0, changes_version: false, breaks_requests: false },
    },
    Case {
        number: 3,
        title: "a patch that passes its probes and fails under real traffic",
        script: Some(content::BREAKS_UNDER_LOAD),
        commit: true,
        rollback: false,
        notice: true,
        expected: Expected { exit_code: 22, flips: 2, changes_version: false, breaks_requests: true },
    },
    Case {
        number: 4,
        title: "the security update of nginx, and the operator wants it back",
        script: None,
        commit: false,
        rollback: true,
        notice: true,
        expected: Expected { exit_code: 0, flips: 2, changes_version: false, breaks_requests: false },
    },
    Case {
        number: 5,
        title: "a patch after which nobody listens on the standby, while the active one is fine",
        script: Some(content::KILLS_THE_SERVICE),
        commit: true,
        rollback: false,
        notice: true,
        expected: Expected { exit_code: 21, flips: 0, changes_version: false, breaks_requests: false },
    },
];

impl Case {
    pub(crate) fn of(number: u8) -> anyhow::Result<Self> {
        CASES
            .into_iter()
            .find(|case| case.number == number)
            .with_context(|| format!("there is no job {number}"))
    }

    fn name(&self) -> String {
        if self.notice { format!("job-{}", self.number) } else { "negative".to_owned() }
    }

    fn files(&self, artifacts: &Path, scripts: &Path) -> anyhow::Result<Vec<PathBuf>> {
        match self.script {
            Some(script) => Ok(vec![scripts.join(script)]),
            None => content::packages(artifacts),
        }
    }
}

/// Everything that a job needs.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    pub(crate) product: &'a Product,
    pub(crate) load: &'a mut Load,
    pub(crate) story: &'a Story,
    /// Where the packages are.
    pub(crate) artifacts: &'a Path,
    /// Where the scripts are.
    pub(crate) scripts: &'a Path,
    /// Where the configuration is.
    pub(crate) directory: &'a Path,
    /// The jobs with a full scan.
    pub(crate) scan: &'a [u8],
    /// What was found after the last job: what is there before the next one.
    pub(crate) found: Option<Found>,
}

/// What serves.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    partition: String,
    version: String,
    /// A digest of the service's files.
    files: String,
}

/// What the story makes of a line of progress.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    /// A phase begins.
    Begins(&'a str),
    /// A phase has ended; with what was said of it.
    Ended(&'a str, &'a str),
    Other(&'a str),
}

fn parse(line: &str) -> Line<'_> {
    let text = line.trim();
    let text = text.strip_prefix("phase ").unwrap_or(text);
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    match rest {
        _ if !PHASES.contains(&word) => Line::Other(line),
        "…" | "..." | "" => Line::Begins(word),
        _ => rest.strip_prefix("done ").map_or(Line::Other(line), |rest| Line::Ended(word, rest)),
    }
}

impl Stage<'_> {
    /// The run that shows what the notice is good for.
    pub(crate) fn negative(&mut self) -> anyhow::Result<Record> {
        self.run(&NEGATIVE)
    }

    /// Runs a job and whatever the operator does after it.
    pub(crate) fn run(&mut self, case: &Case) -> anyhow::Result<Record> {
        let name = case.name();
        self.story.chapter(&format!("{name}: {}", case.title));
        let scan = self.scan.contains(&case.number);
        std::fs::write(self.directory.join("patchswitch.toml"), configuration(self.directory, scan))?;
        let before = self.found.take().map_or_else(|| self.look(), Ok)?;
        let patches = self.add_patches(&case.files(self.artifacts, self.scripts)?)?;
        let rewritten = self.product.rewritten(SERVICE)?;
        let from_ns = self.load.mark(&format!("{name}/plan"))?;
        let mut arguments = vec!["apply", SERVICE];
        arguments.extend(patches.iter().flat_map(|id| ["--patch", id]));
        arguments.extend(case.commit.then_some("--commit"));
        arguments.extend((!case.notice).then_some("--without-notice"));
        let mut ends = vec![self.command(&name, &arguments)?];
        let (mut version_patched, mut rollback_ns) = (None, None);
        if case.rollback && ends[0].code == 0 {
            version_patched = Some(self.product.version(&self.product.active(SERVICE)?)?);
            self.story.say("the operator types: patchswitch rollback web");
            rollback_ns = Some(clock::now_ns());
            ends.push(self.command(&name, &["rollback", SERVICE])?);
        }
        self.load.mark(&format!("{name}/after"))?;
        self.load.settle()?;
        std::thread::sleep(SETTLE);
        let to_ns = clock::now_ns();
        let [v4, v6] = self.product.rewritten(SERVICE)?;
        self.load.mark("between")?;
        let after = self.look()?;
        self.found = Some(after.clone());
        let exit_code = ends.iter().map(|end| end.code).find(|code| *code != 0).unwrap_or(0);
        let (issued, failed) = self.load.so_far()?;
        self.story.say(&format!(
            "{name} ended with exit code {exit_code}; {} serves, nginx {}; \
             {failed} of {issued} requests failed so far",
            after.partition, after.version
        ));
        let error = ends.iter().find(|end| end.code != 0).map(error_of);
        Ok(Record {
            name,
            window: Window { from_ns, to_ns },
            rollback_ns,
            exit_code,
            error,
            reports: ends.into_iter().map(|end| end.report).collect(),
            files_as_before: after.files == before.files,
            version_before: before.version,
            version_patched,
            version_after: after.version,
            rewritten: [v4.saturating_sub(rewritten[0]), v6.saturating_sub(rewritten[1])],
        })
    }

    fn look(&self) -> anyhow::Result<Found> {
        let partition = self.product.active(SERVICE)?;
        let (version, files) = (self.product.version(&partition)?, self.product.fingerprint(&partition)?);
        Ok(Found { partition, version, files })
    }

    /// Adds patches and approves them; known ones stay as they are. Returns their numbers.
    fn add_patches(&mut self, files: &[PathBuf]) -> anyhow::Result<Vec<String>> {
        let files: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
        let mut arguments = vec!["patch", "add"];
        arguments.extend(files.iter().map(String::as_str));
        arguments.extend(["--type", "security", "--approve"]);
        let added = self.product.json(&arguments)?;
        let id = |patch: &Value| patch.get("id").map(ToString::to_string);
        let ids =
            added["patches"].as_array().map(|patches| patches.iter().filter_map(id).collect::<Vec<_>>());
        match ids {
            Some(ids) if ids.len() == files.len() => Ok(ids),
            _ => bail!("patch add did not say which patches it added: {added}"),
        }
    }

    /// A command that is a job, with its phases as the load's.
    fn command(&mut self, name: &str, arguments: &[&str]) -> anyhow::Result<Ended> {
        let mut flipped = false;
        let mut failure = None;
        let (load, story) = (&mut *self.load, self.story);
        let mut note = |line: &str| -> anyhow::Result<()> {
            match parse(line) {
                Line::Begins(phase) => {
                    load.mark(&format!("{name}/{phase}"))?;
                    if phase == "verify" {
                        // Not earlier: a web server closes a connection without a request after a minute.
                        load.open_idle()?;
                        load.start_download()?;
                    }
                    if AFTER_FLIP.contains(&phase) && !flipped {
                        flipped = true;
                        load.use_idle_and_finish_downloads(DOWNLOAD_AFTER_FLIP)?;
                    }
                }
                Line::Ended(phase, rest) => story.detail(&format!("{phase:<10} {rest}")),
                Line::Other(text) => story.detail(text),
            }
            Ok(())
        };
        let ended = self.product.job(arguments, &mut |line| {
            failure = failure.take().or(note(line).err());
        })?;
        failure.map_or(Ok(ended), Err)
    }
}

fn error_of(ended: &Ended) -> String {
    let reported = ended.report.get("error").and_then(Value::as_str);
    reported.map_or_else(|| ended.stderr.clone(), str::to_owned)
}

/// The partitions that the demo defines.
pub(crate) const PARTITIONS: [&str; 2] = [FIRST, SECOND];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read() {
        assert_eq!(parse("clone …"), Line::Begins("clone"));
        assert_eq!(parse("phase take_over ..."), Line::Begins("take_over"));
        assert_eq!(
            parse("clone done in 0.52 s: freeze_ms 70"),
            Line::Ended("clone", "in 0.52 s: freeze_ms 70")
        );
        assert_eq!(parse("cloning …"), Line::Other("cloning …"));
        assert_eq!(parse("drain waits for 3 flows"), Line::Other("drain waits for 3 flows"));
        assert_eq!(parse(""), Line::Other(""));
    }

    #[test]
    fn the_five_jobs_are_there() {
        for number in 1..=5 {
            assert_eq!(Case::of(number).unwrap().name(), format!("job-{number}"));
        }
        assert!(Case::of(6).is_err());
    }
}
