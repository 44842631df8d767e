//! `patchswitch-load`: the load client and its small servers.
#![expect(clippy::print_stdout, reason = "a command prints")]

use std::io::BufRead as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand};
use patchswitch_load::client::{self, DownloadSettings, Marker, Settings};
use patchswitch_load::control::{self, Command, Order, Reply};
use patchswitch_load::knee::{self, KneeSettings};
use patchswitch_load::report::Report;
use patchswitch_load::serve::{self, ServeSettings};
use patchswitch_load::{clock, echo};
use tokio::sync::mpsc::UnboundedSender;

/// Open-loop load on a service, and small servers to try it on.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make load until told to stop, and write a report.
    Run(Box<RunArgs>),
    /// Find the highest rate that the service sustains, and print it as JSON.
    Knee(KneeArgs),
    /// Serve HTTP on wildcard sockets of both families.
    Serve(ServeArgs),
    /// Echo datagrams on wildcard sockets of both families.
    UdpEcho(EchoArgs),
    /// Print the time of the clock that all reports use.
    Clock,
}

#[derive(Debug, Args)]
struct TargetArgs {
    /// IPv4 address of the service.
    #[arg(long)]
    target4: Option<std::net::Ipv4Addr>,
    /// IPv6 address of the service.
    #[arg(long)]
    target6: Option<std::net::Ipv6Addr>,
    /// TCP port of the service.
    #[arg(long, default_value_t = 80)]
    port: u16,
    /// Path of small requests.
    #[arg(long, default_value = "/")]
    path: String,
    /// The Host header, if not the address.
    #[arg(long)]
    host: Option<String>,
    /// Recognise instances by the first line of the answer's body instead of by the Server header. An X-Instance
    /// header comes before both.
    #[arg(long)]
    marker_in_body: bool,
    /// Kept connections in each family.
    #[arg(long, default_value_t = 8)]
    connections: usize,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// UDP port of the echo service.
    #[arg(long)]
    udp_port: Option<u16>,
    /// HTTP requests a second, half of them on new connections.
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// Datagrams a second.
    #[arg(long, default_value_t = 50.0)]
    udp_rate: f64,
    /// Datagram sockets in each family.
    #[arg(long, default_value_t = 4)]
    udp_flows: usize,
    /// Age in seconds at which kept connections and datagram sockets are replaced by fresh ones.
    #[arg(long, default_value_t = 5.0)]
    renew: f64,
    /// Seconds after which a request has failed.
    #[arg(long, default_value_t = 2.0)]
    time_out: f64,
    /// Path of the long download.
    #[arg(long)]
    download: Option<String>,
    /// How fast it is read, in bytes a second.
    #[arg(long, default_value_t = 256 * 1024)]
    download_rate: u64,
    /// SHA-256 of what must come; otherwise a first quick download says.
    #[arg(long)]
    download_sha256: Option<String>,
    /// Open an idle connection in each family at the start.
    #[arg(long)]
    idle: bool,
    /// End after so many seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// End when this file appears.
    #[arg(long)]
    until_file: Option<PathBuf>,
    /// Take orders from the standard input, and end when it is closed.
    #[arg(long)]
    stdin: bool,
    /// Take orders on this UNIX socket.
    #[arg(long)]
    control: Option<PathBuf>,
    /// Where to write the report.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct KneeArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// The first rate, in requests a second.
    #[arg(long, default_value_t = 100.0)]
    first: f64,
    /// The highest rate to try.
    #[arg(long, default_value_t = 20_000.0)]
    highest: f64,
    /// Length of a burst in seconds.
    #[arg(long, default_value_t = 0.7)]
    burst: f64,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// TCP port.
    #[arg(long, default_value_t = 80)]
    port: u16,
    /// What this instance calls itself.
    #[arg(long)]
    tag: String,
    /// Close each connection after so many answers.
    #[arg(long)]
    close_after: Option<u32>,
    /// Echo datagrams on this port as well.
    #[arg(long)]
    udp_port: Option<u16>,
}

#[derive(Debug, Args)]
struct EchoArgs {
    /// UDP port.
    #[arg(long)]
    port: u16,
    /// What this instance calls itself.
    #[arg(long, default_value = "")]
    tag: String,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().verb {
        Verb::Run(args) => run(&args),
        Verb::Knee(args) => {
            let search = KneeSettings {
                first: args.first,
                highest: args.highest,
                burst: seconds(args.burst)?,
                ..KneeSettings::default()
            };
            let knee = knee::measure(&args.target.settings(), &search).context("failed to find the knee")?;
            println!("{}", serde_json::to_string(&knee)?);
            Ok(())
        }
        Verb::Serve(args) => serve_both(args),
        Verb::UdpEcho(EchoArgs { port, tag }) => {
            let sockets = echo::bind(port).with_context(|| format!("failed to open UDP port {port}"))?;
            echo::serve(sockets, &tag).context("failed to receive datagrams")
        }
        Verb::Clock => {
            println!("{}", clock::now_ns());
            Ok(())
        }
    }
}

fn serve_both(args: ServeArgs) -> anyhow::Result<()> {
    if let Some(port) = args.udp_port {
        let sockets = echo::bind(port).with_context(|| format!("failed to open UDP port {port}"))?;
        let tag = args.tag.clone();
        // Ends with the process.
        std::thread::spawn(move || echo::serve(sockets, &tag));
    }
    let ServeArgs { port, tag, close_after, .. } = args;
    let settings = ServeSettings { port, tag, close_after };
    serve::serve(settings).with_context(|| format!("failed to serve on TCP port {port}"))
}

impl TargetArgs {
    fn settings(&self) -> Settings {
        let targets = [self.target4.map(IpAddr::from), self.target6.map(IpAddr::from)];
        Settings {
            path: self.path.clone(),
            host: self.host.clone(),
            marker: if self.marker_in_body { Marker::Body } else { Marker::Server },
            connections: self.connections,
            ..Settings::new(targets.into_iter().flatten().collect(), self.port)
        }
    }
}

impl RunArgs {
    fn settings(&self) -> anyhow::Result<Settings> {
        if self.seconds.is_none() && self.until_file.is_none() && !self.stdin && self.control.is_none() {
            bail!("no end: give --seconds, --until-file, --stdin or --control");
        }
        let download = self.download.clone().map(|path| DownloadSettings {
            path,
            bytes_per_second: self.download_rate,
            sha256: self.download_sha256.clone(),
        });
        Ok(Settings {
            udp_port: self.udp_port,
            rate: self.rate,
            udp_rate: self.udp_rate,
            udp_flows: self.udp_flows,
            renew: seconds(self.renew)?,
            time_out: seconds(self.time_out)?,
            download,
            idle: self.idle,
            duration: self.seconds.map(seconds).transpose()?,
            until_file: self.until_file.clone(),
            ..self.target.settings()
        })
    }
}

fn seconds(value: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(value).with_context(|| format!("{value} is no number of seconds"))
}

fn run(args: &RunArgs) -> anyhow::Result<()> {
    let settings = args.settings()?;
    let (orders, receiver) = tokio::sync::mpsc::unbounded_channel();
    let server = args.control.as_ref().map(|path| {
        control::Server::start(path, orders.clone())
            .with_context(|| format!("failed to listen on {}", path.display()))
    });
    let _server = server.transpose()?;
    if args.stdin {
        let orders = orders.clone();
        std::thread::spawn(move || obey_stdin(&orders));
    }
    stop_at_signal(orders)?;
    let report = client::run(settings, receiver)?.report();
    write(&args.out, &report)?;
    print(&report);
    Ok(())
}

fn obey_stdin(orders: &UnboundedSender<Order>) {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        println!("{}", control::obey(&line, orders).line());
    }
    control::obey("stop", orders);
}

/// A signal ends the run in order, with a report.
fn stop_at_signal(orders: UnboundedSender<Order>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            // The run may have ended meanwhile.
            drop(orders.send(Order { command: Command::Stop, reply: Reply::nobody() }));
            std::io::Result::Ok(())
        })
    });
    Ok(())
}

/// Under another name first, so that a reader never sees half a report.
fn write(path: &Path, report: &Report) -> anyhow::Result<()> {
    let temporary = path.with_extension("tmp");
    let write = || {
        std::fs::write(&temporary, serde_json::to_string(report)?)?;
        std::fs::rename(&temporary, path)?;
        anyhow::Ok(())
    };
    write().with_context(|| format!("failed to write {}", path.display()))
}

fn print(report: &Report) {
    let whole = &report.summary.whole;
    println!("{} requests, {} failed", whole.requests, whole.failed);
    for series in &whole.series {
        let ms = |value: Option<f64>| value.map_or_else(|| "-".into(), |ms| format!("{ms:.1}"));
        println!(
            "{:9} {}: {:6} requests, {:3} failed, p50 {} ms, p99 {} ms, longest {} ms, gap {} ms",
            series.class.to_string(),
            series.family,
            series.requests,
            series.failed,
            ms(series.p50_ms),
            ms(series.p99_ms),
            ms(series.max_ms),
            ms(series.longest_gap.map(|gap| gap.ms)),
        );
    }
    for failure in report.run.failures.iter().take(10) {
        println!("failed: {} {} {}: {}", failure.number, failure.class, failure.family, failure.error);
    }
}
