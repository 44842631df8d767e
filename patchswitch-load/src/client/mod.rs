//! The client: one thread, one schedule, and everything that is under way.
//!
//! ```text
//!  schedule ─ due ─► kept connections (a queue and a pool for each family)
//!                  ├► new connections (a task for each)            all of them ─► recorder ─► Run
//!                  └► datagrams (a few sockets for each family)
//!  commands ──────► idle connections, downloads, marks
//! ```

mod alarm;
mod connection;
mod download;
mod idle;
mod keepalive;
mod single;
mod udp;

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::runtime::LocalOptions;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;

use crate::clock;
use crate::control::{Command, Order, Response, Status};
use crate::record::{Class, Family, Recorder, Ticket};
use crate::report::{Download, IdleUse, Lag, Mark, Run, Sockets};
use crate::schedule::Schedule;

use connection::Answered;

/// How often things without a moment of their own are looked at: time-outs of datagrams, the file that ends a run.
const SWEEP: Duration = Duration::from_millis(100);

/// How to recognise who answered, where the server sends no [`INSTANCE_HEADER`](crate::http::INSTANCE_HEADER).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Marker {
    /// By the first line of a small answer's body.
    Body,
    /// By its `Server` header.
    Server,
}

/// What to download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DownloadSettings {
    /// Its path on the server.
    pub path: String,
    /// How fast it is read, in bytes a second.
    pub bytes_per_second: u64,
    /// SHA-256 of what must come, hexadecimal; none: as in a first quick download before the run.
    pub sha256: Option<String>,
}

/// What to do to whom.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The addresses of the service, at most one in each family.
    pub targets: Vec<IpAddr>,
    /// Its TCP port.
    pub port: u16,
    /// The port of its datagram echo, if it has one.
    pub udp_port: Option<u16>,
    /// HTTP requests a second.
    pub rate: f64,
    /// Datagrams a second.
    pub udp_rate: f64,
    /// The path of small requests.
    pub path: String,
    /// The `Host` header; none: the address.
    pub host: Option<String>,
    /// How to recognise who answered.
    pub marker: Marker,
    /// Kept connections in each family.
    pub connections: usize,
    /// Age after which a kept connection, and a datagram socket, is replaced by a fresh one.
    pub renew: Duration,
    /// Datagram sockets in each family.
    pub udp_flows: usize,
    /// When a request has failed.
    pub time_out: Duration,
    /// What to download when told.
    pub download: Option<DownloadSettings>,
    /// Whether to open an idle connection in each family at the start.
    pub idle: bool,
    /// The end, if it is not told otherwise.
    pub duration: Option<Duration>,
    /// A file whose appearance ends the run.
    pub until_file: Option<PathBuf>,
}

impl Settings {
    /// For a service on given addresses and a port; everything else as the demo has it.
    pub fn new(targets: Vec<IpAddr>, port: u16) -> Self {
        Self {
            targets,
            port,
            udp_port: None,
            rate: 200.0,
            udp_rate: 0.0,
            path: "/".into(),
            host: None,
            marker: Marker::Server,
            connections: 8,
            renew: Duration::from_secs(5),
            udp_flows: 4,
            time_out: Duration::from_secs(2),
            download: None,
            idle: false,
            duration: None,
            until_file: None,
        }
    }

    fn families(&self) -> Vec<Family> {
        self.targets.iter().map(|target| Family::of(*target)).collect()
    }

    fn target(&self, family: Family) -> Option<SocketAddr> {
        let address = self.targets.iter().find(|target| Family::of(**target) == family)?;
        Some(SocketAddr::new(*address, self.port))
    }

    fn host(&self, target: SocketAddr) -> String {
        // RFC 9110, section 7.2: an IPv6 address in brackets, as `SocketAddr` prints it.
        self.host.clone().unwrap_or_else(|| target.to_string())
    }
}

/// Why a run could not be made. What goes wrong *during* it is in its result.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No address, or two of one family.
    #[error("one address of IPv4, of IPv6 or of both is needed, not {0:?}")]
    Targets(Vec<IpAddr>),
    /// The first quick download, which says what is right, failed.
    #[error("failed to download {path} from {target} before the run")]
    Download {
        /// Its path.
        path: String,
        /// From whom.
        target: SocketAddr,
        /// How.
        #[source]
        source: crate::record::ErrorKind,
    },
    /// Two families gave two contents.
    #[error("{path} has two contents before the run already: {first} and {second}")]
    Contents {
        /// Its path.
        path: String,
        /// The digest in the first family.
        first: String,
        /// In the second.
        second: String,
    },
    /// A socket, a thread or a runtime could not be made.
    #[error("failed to {action}")]
    Io {
        /// What.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// What all parts of a run share. One thread: no locks.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    start: Instant,
    recorder: RefCell<Recorder>,
    sockets: RefCell<Sockets>,
    downloads: RefCell<Vec<Download>>,
    idle_uses: RefCell<Vec<IdleUse>>,
    /// Downloads under way.
    downloading: Cell<usize>,
    /// Downloads that are no longer slowed down.
    hurry: Cell<bool>,
}

impl Shared {
    fn issue(&self, class: Class, family: Family, due_ns: u64) -> Ticket {
        self.recorder.borrow_mut().issue(class, family, due_ns)
    }

    /// When a request has failed that is due at a time.
    fn deadline(&self, ticket: &Ticket) -> Instant {
        let since = ticket.due_ns.saturating_sub(self.recorder.borrow().started_ns);
        self.start + Duration::from_nanos(since) + self.settings.time_out
    }

    /// Who gave an answer.
    fn instance(&self, answered: &Answered) -> u8 {
        let line = || {
            let body = String::from_utf8_lossy(&answered.body);
            crate::http::shorten(body.lines().next().unwrap_or("").trim())
        };
        let head = &answered.head;
        let name = head.instance.clone().unwrap_or_else(|| match self.settings.marker {
            // An error page does not begin with the marker.
            Marker::Body if head.status == 200 => line(),
            _ => head.server.clone().unwrap_or_default(),
        });
        self.recorder.borrow_mut().instance(&name)
    }
}

/// Runs the load to its end and returns what happened. Blocks; makes its own single-threaded runtime.
///
/// Orders come through the channel (see [`crate::control`]); a closed channel is no order.
///
/// # Errors
/// [`LoadError`] if it could not even begin.
pub fn run(settings: Settings, orders: UnboundedReceiver<Order>) -> Result<Run, LoadError> {
    let io = |source| LoadError::Io { action: "make the client's runtime", source };
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build_local(LocalOptions::default()).map_err(io)?;
    // As a task: waking what `block_on` itself waits for costs two system calls, and the schedule wakes often.
    let client = runtime.spawn_local(client(settings, orders));
    match runtime.block_on(client).map_err(tokio::task::JoinError::try_into_panic) {
        Ok(result) => result,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // Nobody cancels it.
        Err(Err(error)) => Err(io(error.into())),
    }
}

async fn client(mut settings: Settings, orders: UnboundedReceiver<Order>) -> Result<Run, LoadError> {
    let families = settings.families();
    if !matches!(families[..], [_] | [Family::V4, Family::V6] | [Family::V6, Family::V4]) {
        return Err(LoadError::Targets(settings.targets));
    }
    download::learn_digest(&mut settings).await?;
    let mut schedules = [
        Schedule::http(settings.rate, &families),
        Schedule::udp(settings.udp_port.map_or(0.0, |_| settings.udp_rate), &families),
    ];
    let told = [Class::Download, Class::Idle].into_iter();
    let told = told.flat_map(|class| families.iter().map(move |family| (class, *family)));
    let series: Vec<_> = schedules.iter().flat_map(Schedule::series).chain(told).collect();
    let shared = Rc::new(Shared {
        start: Instant::now(),
        recorder: RefCell::new(Recorder::new(clock::now_ns(), series)),
        sockets: RefCell::default(),
        downloads: RefCell::default(),
        idle_uses: RefCell::default(),
        downloading: Cell::new(0),
        hurry: Cell::new(false),
        settings,
    });
    Dispatcher::new(&shared, &families)?.run(&mut schedules, orders).await
}

fn to_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Sends what is due where it belongs.
struct Dispatcher {
    shared: Rc<Shared>,
    pools: Vec<(Family, keepalive::Pool)>,
    flows: Vec<(Family, udp::Flows)>,
    idle: idle::Idle,
    marks: Vec<Mark>,
    lag: Lag,
    wall_ms: u64,
}

impl Dispatcher {
    fn new(shared: &Rc<Shared>, families: &[Family]) -> Result<Self, LoadError> {
        let udp = shared.settings.udp_port.is_some() && shared.settings.udp_rate > 0.0;
        let flows = families.iter().filter(|_| udp);
        let flows = flows.map(|family| Ok((*family, udp::Flows::new(shared, *family)?)));
        Ok(Self {
            pools: families.iter().map(|family| (*family, keepalive::Pool::start(shared, *family))).collect(),
            flows: flows.collect::<Result<_, LoadError>>()?,
            idle: idle::Idle::new(shared),
            marks: Vec::new(),
            lag: Lag::default(),
            wall_ms: clock::wall_ms(),
            shared: Rc::clone(shared),
        })
    }

    async fn run(
        mut self,
        schedules: &mut [Schedule],
        mut orders: UnboundedReceiver<Order>,
    ) -> Result<Run, LoadError> {
        let failed = |source| LoadError::Io { action: "set the client's alarm", source };
        let alarm = alarm::Alarm::new().map_err(failed)?;
        let started_ns = self.shared.recorder.borrow().started_ns;
        // A timer of the runtime that is always nearer than the requests' time-outs: else each of them, being the
        // nearest, would wake the runtime by a system call.
        let mut sweep = tokio::time::interval(SWEEP);
        let mut listening = true;
        loop {
            let due = schedules.iter().filter_map(Schedule::due).min();
            let next = due.map_or(u64::MAX, |due| started_ns + to_ns(due));
            tokio::select! {
                order = orders.recv(), if listening => match order {
                    Some(Order { command: Command::Stop, reply }) => {
                        reply.give(Response::Done);
                        break;
                    }
                    Some(order) => self.obey(order),
                    None => listening = false,
                },
                result = alarm.wait_until(next) => result.map_err(failed)?,
                _ = sweep.tick() => if self.sweep() {
                    break;
                },
            }
            self.dispatch(schedules);
        }
        self.finish().await
    }

    fn dispatch(&mut self, schedules: &mut [Schedule]) {
        let started_ns = self.shared.recorder.borrow().started_ns;
        for schedule in schedules {
            let now = Duration::from_nanos(clock::now_ns().saturating_sub(started_ns));
            while let Some((due, class, family)) = schedule.take(now) {
                self.note_lag(now.saturating_sub(due));
                let ticket = self.shared.issue(class, family, started_ns + to_ns(due));
                self.send(ticket);
            }
        }
    }

    fn send(&mut self, ticket: Ticket) {
        let of = |family: Family| move |(f, _): &&mut (Family, _)| *f == family;
        match ticket.class {
            Class::Keepalive => {
                if let Some((_, pool)) = self.pools.iter().find(|(family, _)| *family == ticket.family) {
                    pool.push(ticket);
                }
            }
            Class::Udp => {
                if let Some((_, flows)) = self.flows.iter_mut().find(of(ticket.family)) {
                    flows.send(ticket);
                }
            }
            _ => single::start(&self.shared, ticket),
        }
    }

    fn note_lag(&mut self, lag: Duration) {
        let ms = lag.as_secs_f64() * 1000.0;
        if ms > self.lag.longest_ms {
            self.lag.longest_ms = ms;
            self.lag.longest_at_ns = clock::now_ns();
        }
        self.lag.over_10_ms += u64::from(ms > 10.0);
    }

    /// Looks at what has no moment of its own; true when the run is over.
    fn sweep(&mut self) -> bool {
        for (_, flows) in &mut self.flows {
            flows.sweep();
        }
        let settings = &self.shared.settings;
        settings.duration.is_some_and(|duration| self.shared.start.elapsed() >= duration)
            || settings.until_file.as_ref().is_some_and(|file| file.exists())
    }

    fn obey(&mut self, order: Order) {
        let shared = &self.shared;
        let response = match order.command {
            Command::Mark { name, at_ns } => {
                let at_ns = at_ns.unwrap_or_else(clock::now_ns);
                self.marks.push(Mark { name, at_ns });
                Response::Value(at_ns)
            }
            Command::OpenIdle => return self.idle.open(order.reply),
            Command::UseIdle => return self.idle.use_all(order.reply),
            Command::StartDownload => download::start(shared),
            Command::FinishDownload => return download::finish(shared, order.reply),
            Command::Status => self.status(),
            Command::Stop => Response::Done,
        };
        order.reply.give(response);
    }

    fn status(&self) -> Response {
        let recorder = self.shared.recorder.borrow();
        let first = recorder.failures.first();
        Response::Status(Status {
            now_ns: clock::now_ns(),
            issued: recorder.issued(),
            answered: recorder.answered(),
            failed: recorder.failures.len() as u64,
            first_failure_ns: first.map(|failure| failure.failed_ns),
            downloading: self.shared.downloading.get() as u64,
        })
    }

    /// Issues nothing more, and waits for the end of what is under way: it is bounded by the time-outs, except for
    /// downloads, which are read at full speed now.
    async fn finish(mut self) -> Result<Run, LoadError> {
        let ended_ns = clock::now_ns();
        self.shared.hurry.set(true);
        while self.shared.recorder.borrow().outstanding() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            for (_, flows) in &mut self.flows {
                flows.sweep();
            }
        }
        let recorder = self.shared.recorder.borrow();
        Ok(Run {
            started_ns: recorder.started_ns,
            ended_ns,
            started_wall_ms: self.wall_ms,
            rate: self.shared.settings.rate,
            udp_rate: if self.flows.is_empty() { 0.0 } else { self.shared.settings.udp_rate },
            marks: self.marks,
            instances: recorder.instances.clone(),
            answers: recorder.series.clone(),
            failures: recorder.failures.clone(),
            downloads: self.shared.downloads.borrow().clone(),
            idle_uses: self.shared.idle_uses.borrow().clone(),
            lag: self.lag,
            sockets: *self.shared.sockets.borrow(),
            standstills: Vec::new(),
        })
    }
}
