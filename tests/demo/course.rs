//! The course of the demo from the empty machine back to it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use patchswitch_load::clock;
use patchswitch_load::knee::Knee;
use patchswitch_load::report::{Run, Window};
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab;
use patchswitch_tests::programs;
use patchswitch_tests::standstill::Witness;
use patchswitch_tests::vm;

use crate::ground::{FIRST, Ground, SECOND, SERVICE, Scratch, configuration};
use crate::jobs::{Case, PARTITIONS, Stage};
use crate::measure::{Evidence, Record};
use crate::product::Product;
use crate::report::{LEAST_RATE, RunReport};
use crate::story::Story;
use crate::traffic::{self, Load};
use crate::watch::{self, Retransmissions};
use crate::{RunArgs, content};

/// How long the load runs before anything is measured: connections are opened, caches get warm.
const WARM_UP: Duration = Duration::from_secs(2);
const QUIET: Duration = Duration::from_secs(12);
const QUIET_QUICK: Duration = Duration::from_secs(5);
/// How long the kernel may take to free what nobody uses any more.
const PATIENCE: Duration = Duration::from_secs(5);
/// The size of a partition's disk.
const SIZE: &str = "1G";

/// Runs the demo.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<RunReport> {
    let cases: Vec<Case> = args.jobs.iter().map(|number| Case::of(*number)).collect::<Result<_, _>>()?;
    let story = Story::begin();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    story.say(&format!("Linux {release}, processors: {}", processors()?));
    let scratch = match &args.scratch {
        Some(directory) => Scratch::Directory(directory.clone()),
        None => {
            Scratch::Disk(vm::scratch_disk()?.context("this is not the test machine: --scratch is needed")?)
        }
    };
    let ground = Ground::build(&scratch)?;
    let before = Snapshot::take()?;
    let config = ground.directory.join("patchswitch.toml");
    fs::write(&config, configuration(&ground.directory, false))?;
    let product = Product::new(&config)?;
    let measured = serve(args, &story, &product, &ground)
        .and_then(|()| measure(args, &cases, &story, &product, &ground));
    // Everything is taken away in any case, and the first error is told.
    let dismantled = dismantle(&story, &product);
    // Before the demo's own things are removed, so that what changed of them counts as well.
    let left = leftovers(&before, &ground);
    let removed = dismantled.and(ground.remove());
    let (evidence, records, negative, knee) = measured?;
    removed?;
    let quiet = evidence.quiet(&records);
    let jobs: Vec<_> = records.iter().map(|record| evidence.job(record, &quiet)).collect();
    let mut report = RunReport {
        kernel: release,
        processors: processors()?,
        knee,
        jobs,
        negative: negative.and_then(|negative| evidence.negative(&records, &negative)),
        leftovers: left?,
        checks: Vec::new(),
        seconds: story.seconds(),
        quiet,
    };
    for (case, job) in cases.iter().zip(&report.jobs) {
        report.checks.extend(job.checks(case.expected, &report.quiet));
    }
    report.checks.extend(report.own_checks());
    Ok(report)
}

/// Defines the partitions and starts the service.
fn serve(args: &RunArgs, story: &Story, product: &Product, ground: &Ground) -> anyhow::Result<()> {
    let scripts = ground.directory.join("patches");
    fs::create_dir(&scripts)?;
    content::patches(&scripts)?;
    let root = args.artifacts.join("root.tar").display().to_string();
    let resources = ["--size", SIZE, "--cpu", "100", "--memory", "256M", "--network", netlab::UPLINK];
    let own = |[v4, v6]: [&'static str; 2]| ["--own", v4, "--own", v6];
    let first = ["partition", "define", FIRST, "--from", &root, "--command", content::COMMAND];
    product.run(&[&first[..], &resources, &own(netlab::OWN_A)].concat())?;
    story.say(&format!("partition {FIRST} is defined: Debian with nginx, on a disk of its own"));
    let second = ["partition", "define", SECOND, "--standby"];
    product.run(&[&second[..], &resources, &own(netlab::OWN_B)].concat())?;
    story.say(&format!("partition {SECOND} is defined: an empty standby of the same size"));
    product.run(&["service", "add", SERVICE])?;
    // What was written until now is not to be waited for in the middle of what is measured.
    programs::run(&["sync"])?;
    let version = product.version(FIRST)?;
    let [v4, v6] = netlab::SERVICE;
    story.say(&format!("{FIRST} serves {v4} and {v6} with nginx {version}"));
    Ok(())
}

/// What was recorded: of everything, of each job, of the switch without the notice; and the knee.
type Measured = (Evidence, Vec<Record>, Option<Record>, Option<f64>);

/// Makes load, runs the jobs, ends the load.
fn measure(
    args: &RunArgs,
    cases: &[Case],
    story: &Story,
    product: &Product,
    ground: &Ground,
) -> anyhow::Result<Measured> {
    let measured = !args.quick && args.rate.is_none();
    let knee = measured.then(|| traffic::knee(&ground.client)).transpose()?;
    let rate = args.rate.or(knee.as_ref().map(Knee::demo_rate)).unwrap_or(LEAST_RATE);
    let knee = knee.and_then(|knee| knee.rate);
    match knee {
        Some(knee) => story.say(&format!("the service begins to lag at {knee:.0} requests/s")),
        None if measured => {
            story.say("the service lags at any rate: this machine is busy with something else");
        }
        None => {}
    }
    let capture = watch::resets()?;
    let retransmissions = Retransmissions::start(&ground.client);
    let witness = Witness::start();
    let mut load = Load::start(&ground.client, rate, &ground.directory)?;
    story.say(&format!("load from now on: {rate:.0} requests/s, half of them on new connections, and datagrams; IPv4 and IPv6"));
    std::thread::sleep(WARM_UP);
    let from_ns = load.mark("quiet")?;
    std::thread::sleep(if args.quick { QUIET_QUICK } else { QUIET });
    let quiet = Window { from_ns, to_ns: clock::now_ns() };
    load.mark("between")?;
    story.say("so much for the quiet time");
    let scripts = ground.directory.join("patches");
    let mut stage = Stage {
        product,
        load: &mut load,
        story,
        artifacts: &args.artifacts,
        scripts: &scripts,
        directory: &ground.directory,
        scan: &args.scan,
        found: None,
    };
    let records = run_all(&mut stage, cases);
    let negative = match &records {
        Ok(_) if args.negative => stage.negative().map(Some),
        _ => Ok(None),
    };
    story.chapter("the load ends");
    let run = load.stop(&args.out.with_file_name("load.json"))?;
    let evidence = Evidence {
        run: Run { standstills: witness.stop()?, ..run },
        resets: capture.stop().inspect_err(|error| story.say(&format!("{error:#}"))).ok(),
        retransmissions: retransmissions.stop()?,
        quiet,
    };
    Ok((evidence, records?, negative?, knee))
}

fn run_all(stage: &mut Stage<'_>, cases: &[Case]) -> anyhow::Result<Vec<Record>> {
    cases.iter().map(|case| stage.run(case)).collect()
}

/// Takes service and partitions away, whatever of them is there, and returns the first error.
fn dismantle(story: &Story, product: &Product) -> anyhow::Result<()> {
    let mut result = product.run(&["service", "remove", SERVICE]).map(drop);
    for partition in PARTITIONS {
        result = result.and(product.run(&["partition", "remove", partition]).map(drop));
    }
    result = result.and(product.run(&["down"]).map(drop));
    if result.is_ok() {
        story.say("service and partitions are removed");
    }
    result.context("failed to remove what the demo made")
}

/// What is there that was not there before, or the other way round.
fn leftovers(before: &Snapshot, ground: &Ground) -> anyhow::Result<Vec<String>> {
    let left = Snapshot::left_since(before, PATIENCE)?;
    let mut left: Vec<String> = left.iter().map(ToString::to_string).collect();
    let disks = ground.directory.join("state/disks");
    if disks.is_dir() {
        for entry in fs::read_dir(&disks)? {
            left.push(format!("image {} is left", entry?.path().display()));
        }
    }
    Ok(left)
}

fn processors() -> anyhow::Result<usize> {
    let text = fs::read_to_string(Path::new("/proc/cpuinfo"))?;
    Ok(text.lines().filter(|line| line.starts_with("processor")).count())
}
