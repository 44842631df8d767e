//! `cargo xtask demo`: the main job on real parts, told as a story.
//!
//! ```text
//!  setup ─► programs, root of the partition, packages of the patch (cached)
//!        ─► Linux 6.12: five jobs ─► Linux 6.1: the first ─► target/demo/report.json
//! ```

use std::fs;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use patchswitch_guest::{End, Request};
use serde_json::Value;

use crate::build;
use crate::cache::{Cache, say};
use crate::command::Tool;
use crate::paths;
use crate::setup::{self, Need};
use crate::vm::agent::{self, Stream};
use crate::vm::boot::{Config, Vm};
use crate::vm::image;
use crate::vm::kernel::Series;
use crate::vm::payload::Payload;

/// What runs where: a series of kernels, and the jobs in their order.
const RUNS: [(&str, &str); 2] = [("6.12", ALL_JOBS), ("6.1", "1")];
/// First what goes wrong, each from the state that the last one left; at the end the job that changes it.
const ALL_JOBS: &str = "2,5,3,4,1";
/// The program.
const DEMO: &str = "patchswitch-demo";
/// Where the report is in the test machine.
const OUT: &str = "/run/demo-report";
/// A run that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(1200);

/// Shows the main job: a Debian with nginx is cloned, patched, switched to and committed, under load throughout.
///
/// Four jobs before it show what becomes of one that goes wrong. Everything happens in disposable test machines
/// (see `cargo xtask vm`) with stock Debian kernels, and is measured from outside; at the end stands what must hold
/// and whether it does. The report is target/demo/report.json.
///
/// The first time takes some minutes more, because kernels and images are fetched and made.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run it on this host instead; needs root and device-mapper
    #[arg(long, conflicts_with = "kernel")]
    host: bool,
    /// Only on this series of kernels, with all jobs
    #[arg(long, value_name = "SERIES")]
    kernel: Option<Series>,
    /// Only these jobs, in this order
    #[arg(long, value_name = "NUMBERS")]
    jobs: Option<String>,
    /// Requests a second, instead of what the service bears
    #[arg(long, value_name = "NUMBER")]
    rate: Option<f64>,
    /// Do not measure how much load the service bears, and keep the quiet time short
    #[arg(long)]
    quick: bool,
}

/// What a test machine keeps busy of the host: the processor that is emulated, and what QEMU does beside that. With fewer,
/// two machines would measure each other.
const PROCESSORS: usize = 2;

/// Runs `cargo xtask demo`.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    setup::ensure(&[Need::Build, Need::Machine])?;
    build::programs()?;
    build::demo()?;
    let cache = Cache::open()?;
    let payload = payload(&cache)?;
    let out = paths::target().join("demo");
    fs::create_dir_all(&out).with_context(|| format!("failed to make {}", out.display()))?;
    let selected = selection(options)?;
    let good = match selected.as_slice() {
        [(None, jobs)] => on_host(&payload, &arguments(options, jobs), &out.join("host"))?,
        machines => in_machines(machines, options, (&cache, &payload, &out))?,
    };
    let mut runs: Vec<Value> = Vec::new();
    for (series, _) in &selected {
        let name = series.as_ref().map_or_else(|| "host".to_owned(), ToString::to_string);
        let report = out.join(name).join("report.json");
        let text =
            fs::read_to_string(&report).with_context(|| format!("there is no {}", report.display()))?;
        runs.push(serde_json::from_str(&text)?);
    }
    let report = out.join("report.json");
    fs::write(&report, serde_json::to_string_pretty(&runs)?)?;
    let seconds = start.elapsed().as_secs_f64();
    say(&format!("{}; the whole took {seconds:.0} s", report.display()));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the demo in all test machines, side by side as far as there are processors; true if everything held.
///
/// The first one tells its story while it happens; what the others say is told when it is over.
fn in_machines(
    selected: &[(Option<Series>, String)],
    options: &Options,
    (cache, payload, out): (&Cache, &Payload, &Path),
) -> Result<bool> {
    let run = |(series, jobs): &(Option<Series>, String), tell: Tell<'_>| {
        let series = series.as_ref().context("no series")?;
        in_machine(cache, payload, series, &arguments(options, jobs), &out.join(series.to_string()), tell)
    };
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let (first, rest) = selected.split_first().context("nothing to run")?;
    if processors < PROCESSORS * selected.len() || rest.is_empty() {
        return selected.iter().try_fold(true, |good, one| Ok(run(one, &mut agent::to_terminal)? && good));
    }
    thread::scope(|scope| {
        let others: Vec<_> = rest
            .iter()
            .map(|one| {
                scope.spawn(move || {
                    let mut said = Vec::new();
                    let mut keep = |stream, bytes: &[u8]| {
                        said.push((stream, bytes.to_vec()));
                        Ok(())
                    };
                    (run(one, &mut keep), said)
                })
            })
            .collect();
        let mut good = run(first, &mut agent::to_terminal)?;
        for other in others {
            let (ended, said) =
                other.join().map_err(|_panic| anyhow::anyhow!("a run of the demo panicked"))?;
            say("and meanwhile in the other test machine:");
            for (stream, bytes) in said {
                agent::to_terminal(stream, &bytes)?;
            }
            good &= ended?;
        }
        Ok(good)
    })
}

/// Gets what a run says.
type Tell<'a> = &'a mut dyn FnMut(Stream, &[u8]) -> Result<()>;

/// Series of kernels with their jobs; no series: this host.
fn selection(options: &Options) -> Result<Vec<(Option<Series>, String)>> {
    let jobs = |jobs: &str| options.jobs.clone().unwrap_or_else(|| jobs.to_owned());
    if options.host {
        return Ok(vec![(None, jobs(ALL_JOBS))]);
    }
    if let Some(series) = &options.kernel {
        return Ok(vec![(Some(series.clone()), jobs(ALL_JOBS))]);
    }
    RUNS.iter().map(|(series, defaults)| Ok((Some(series.parse()?), jobs(defaults)))).collect()
}

fn arguments(options: &Options, jobs: &str) -> Vec<String> {
    let mut words: Vec<String> = ["run", "--jobs", jobs].map(str::to_owned).into();
    // Once is enough to show it.
    words.extend((jobs == ALL_JOBS).then(|| "--negative".to_owned()));
    words.extend(options.quick.then(|| "--quick".to_owned()));
    words.extend(options.rate.map(|rate| format!("--rate={rate}")));
    words
}

/// The programs, and what the demo works on.
fn payload(cache: &Cache) -> Result<Payload> {
    let payload = Payload::new(cache)?;
    payload.add_programs()?;
    let artifacts = payload.dir().join("artifacts");
    fs::create_dir(&artifacts)?;
    let root = image::partition_root(cache)?;
    let prepare = Tool::new(build::programs_dir().join(DEMO)).args(["prepare", "--root"]).arg(&root);
    prepare.arg("--out").arg(artifacts.join("root.tar")).quiet()?;
    let patch = image::patch(cache)?;
    say(&format!("the patch: nginx {} -> {}", patch.from, patch.to));
    for file in patch.files {
        let name = file.file_name().context("no file name")?.to_string_lossy().into_owned();
        payload.add_as(&file, &format!("artifacts/{name}"))?;
    }
    Ok(payload)
}

/// Runs the demo in a test machine; true if everything held.
fn in_machine(
    cache: &Cache,
    payload: &Payload,
    series: &Series,
    arguments: &[String],
    place: &Path,
    tell: Tell<'_>,
) -> Result<bool> {
    let config = Config { payload: Some(payload.dir().to_owned()), ..Config::new(series.clone()) };
    let vm = Vm::boot(cache, &config)?;
    let program = format!("/payload/{DEMO}");
    let report = format!("{OUT}/report.json");
    let fixed = ["--artifacts", "/payload/artifacts", "--out", &report];
    let words = std::iter::once(program.as_str()).chain(arguments.iter().map(String::as_str)).chain(fixed);
    let request = Request {
        argv: words.map(str::to_owned).collect(),
        limit_ms: u64::try_from(LIMIT.as_millis())?,
        ..Request::default()
    };
    let end = vm.stream(&request, tell)?;
    // Even a run that did not get to its end may have something to tell.
    let pulled = vm.pull(OUT, place);
    if !matches!(end, End::Code(0 | 1)) {
        say(&format!("the kernel's log:\n{}", vm.console()));
        bail!("the demo ended with {end:?}");
    }
    pulled?;
    vm.power_off()?;
    Ok(end == End::Code(0))
}

/// Runs the demo on this machine; true if everything held.
fn on_host(payload: &Payload, arguments: &[String], place: &Path) -> Result<bool> {
    if !rustix::process::geteuid().is_root() {
        bail!("--host needs root");
    }
    fs::create_dir_all(place)?;
    let tool = Tool::new(payload.dir().join(DEMO)).args(arguments).arg("--artifacts");
    let tool = tool.arg(payload.dir().join("artifacts")).arg("--scratch").arg(place);
    let status = tool.arg("--out").arg(place.join("report.json")).stdout(Stdio::inherit()).spawn()?.wait()?;
    match status.code() {
        Some(code @ (0 | 1)) => Ok(code == 0),
        _ => bail!("the demo ended with {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(host: bool, kernel: Option<&str>, jobs: Option<&str>) -> Options {
        let kernel = kernel.map(|series| series.parse().unwrap());
        Options { host, kernel, jobs: jobs.map(str::to_owned), rate: Some(80.5), quick: true }
    }

    #[test]
    fn all_jobs_run_on_the_first_kernel_and_the_first_on_both() {
        let series = |text: &str| Some(text.parse::<Series>().unwrap());
        let selected = |host, kernel, jobs| selection(&options(host, kernel, jobs)).unwrap();
        assert_eq!(
            selected(false, None, None),
            [(series("6.12"), ALL_JOBS.to_owned()), (series("6.1"), "1".into())]
        );
        assert_eq!(selected(false, Some("6.1"), Some("1,2")), [(series("6.1"), "1,2".to_owned())]);
        assert_eq!(selected(true, None, None), [(None, ALL_JOBS.to_owned())]);
        assert_eq!(
            arguments(&options(true, None, None), "1"),
            ["run", "--jobs", "1", "--quick", "--rate=80.5"]
        );
    }
}
