//! Rows 12 and 22: what the programs cost by themselves, by `BPF_PROG_TEST_RUN`, over a program that does nothing.
//!
//! The programs are those that the product has attached, with its maps, in the state that a job brings them to. Hot is
//! one packet many times; cold is another flow each time, one run a call, as is what changes its packet: a second run
//! would see a packet that is rewritten already.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use aya::EbpfLoader;
use aya::programs::SchedClassifier;
use patchswitch::dataplane::{self, Point};
use patchswitch_common::Slot;
use patchswitch_tests::frame::{self, Ip};
use patchswitch_tests::netlab::{CLIENT, Ns, OWN_A, SERVICE, UPLINK};
use patchswitch_tests::traffic::{ECHO, PORT};

use crate::flows::Flows;
use crate::kernel;
use crate::peers::{PRODUCT, Product, Side};
use crate::plan::{Scale, pin_to};
use crate::report::{Figure, Found, Target};
use crate::stats::{Random, abba, median};

/// Where `struct __sk_buff` has the index of the device.
const IFINDEX: usize = 40;
const CONTEXT: usize = 192;
/// `TC_ACT_REDIRECT`.
const REDIRECT: i32 = 7;
/// `TC_ACT_UNSPEC`.
const NEXT: i32 = -1;
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
/// A client's port that no connection has.
const NOBODY: u16 = 1999;
/// The ports of a connected datagram socket.
const CONNECTED: [u16; 2] = [5000, 6000];
const STEADY_NS: f64 = 15.0;
const OVER_LOOKUP_NS: f64 = 15.0;
const UDP_NS: f64 = 45.0;
const REWRITE_NS: f64 = 25.0;

/// What our program is compared with.
enum Against {
    Empty,
    Lookup(SocketAddr, SocketAddr),
}

/// A packet on its way, and how it is measured.
struct Scene {
    metric: &'static str,
    point: Point,
    frames: Vec<Vec<u8>>,
    action: i32,
    /// One run a call.
    single: bool,
    against: Against,
    limit: Option<f64>,
}

impl Scene {
    fn new(metric: &'static str, point: Point, frame: Vec<u8>) -> Self {
        let (action, against) = (REDIRECT, Against::Empty);
        Self { metric, point, frames: vec![frame], action, single: false, against, limit: None }
    }

    fn at_most(self, ns: f64) -> Self {
        Self { limit: Some(ns), ..self }
    }

    fn over_lookup(self, from: SocketAddr, to: SocketAddr) -> Self {
        Self { against: Against::Lookup(from, to), limit: Some(OVER_LOOKUP_NS), ..self }
    }
}

/// A link address and index.
#[derive(Clone, Copy)]
pub(crate) struct Link {
    pub(crate) index: u32,
    mac: [u8; 6],
}

pub(crate) fn link(ns: &Ns, name: &str) -> Result<Link> {
    let value: serde_json::Value = serde_json::from_str(&ns.ip(&format!("-j link show dev {name}"))?)?;
    let text = value[0]["address"].as_str().context("no address")?;
    let mac: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    let index = value[0]["ifindex"].as_u64().context("no index")?;
    Ok(Link { index: u32::try_from(index)?, mac: mac.try_into().ok().context("not a MAC")? })
}

/// The product with connections of all kinds to its first side.
struct Bench<'a> {
    product: &'a Product,
    scale: Scale,
    uplink: Link,
    /// The host's end of the first side's link, and the side's own.
    link: Link,
    inner: Link,
    programs: [(Point, SchedClassifier); 2],
    empty: OwnedFd,
    nsid: i32,
}

/// Measures rows 12 and 22.
pub(crate) fn measure(product: &mut Product, scale: Scale, found: &mut Found) -> Result<()> {
    load(scale, found)?;
    let links = product.hooks()?;
    let first = links.iter().find(|hook| hook.point == Point::FromPartition).context("no link")?.link.clone();
    let open = |point: Point| {
        let path = product.pins().join("programs").join(point.program());
        Ok::<_, anyhow::Error>((point, SchedClassifier::from_pin(path)?))
    };
    let lab = crate::peers::Peer::lab(product);
    let bench = Bench {
        product,
        scale,
        uplink: link(&lab.host, UPLINK)?,
        link: link(&lab.host, &first)?,
        inner: link(&lab.a, "eth0")?,
        programs: [open(Point::Uplink)?, open(Point::FromPartition)?],
        empty: kernel::empty()?,
        nsid: product.with(async |attachment| Ok(attachment.plane().slot(Slot::A)?.nsid))?,
    };
    bench.measure(found)
}

fn service(family: usize, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(SERVICE[family].parse()?, port))
}

impl Bench<'_> {
    fn measure(&self, found: &mut Found) -> Result<()> {
        let lab = crate::peers::Peer::lab(self.product);
        let listeners = lab
            .a
            .enter(|| Ok([TcpListener::bind(service(0, PORT)?)?, TcpListener::bind(service(1, PORT)?)?]))?;
        let streams = lab
            .client
            .enter(|| Ok([TcpStream::connect(service(0, PORT)?)?, TcpStream::connect(service(1, PORT)?)?]))?;
        let accepted = [listeners[0].accept()?, listeners[1].accept()?];
        let ends = [streams[0].local_addr()?, streams[1].local_addr()?];
        let flows = Flows::open(self.product, Side::A, self.scale.cold_flows())?;
        self.steady(ends, &flows, found)?;
        self.product.learn()?;
        let (echo, client) = (
            lab.a.enter(|| Ok(UdpSocket::bind(("0.0.0.0", ECHO))?))?,
            lab.client.enter(|| Ok(UdpSocket::bind((CLIENT[0], 0))?))?,
        );
        let connected = lab.a.enter(|| {
            let socket = UdpSocket::bind((SERVICE[0], CONNECTED[0]))?;
            socket.connect((CLIENT[0], CONNECTED[1]))?;
            Ok(socket)
        })?;
        client.send_to(b"learn", service(0, ECHO)?)?;
        let (_, asking) = echo.recv_from(&mut [0; 16])?;
        echo.send_to(b"learned", asking)?;
        self.product.take_over(Side::B)?;
        self.draining(ends, asking, &flows, found)?;
        drop((connected, accepted, flows));
        self.product.take_over(Side::A)?;
        self.product.settle()
    }

    fn inbound(&self, packet: &Ip) -> Vec<u8> {
        packet.frame(self.uplink.mac)
    }

    /// As the first side sends it.
    fn outbound(&self, packet: &Ip) -> Vec<u8> {
        let mut frame = packet.frame(self.link.mac);
        frame[6..12].copy_from_slice(&self.inner.mac);
        frame
    }

    fn client(&self, from: SocketAddr, flags: u8) -> Result<Vec<u8>> {
        let to = service(usize::from(from.is_ipv6()), PORT)?;
        Ok(self.inbound(&frame::tcp((from.ip(), from.port()), (to.ip(), to.port()), flags, b"")))
    }

    fn datagram(&self, from: SocketAddr, port: u16) -> Result<Vec<u8>> {
        Ok(self.inbound(&frame::udp((from.ip(), from.port()), (SERVICE[0].parse()?, port), &[0; 18])))
    }

    /// A packet of each of many connections, in no order.
    fn of_flows(&self, flows: &Flows) -> Result<Vec<Vec<u8>>> {
        let to = service(0, crate::flows::PORT)?;
        let mut random = Random(7);
        let frame = |_| {
            let stream = &flows.clients[(random.next() >> 20) as usize % flows.clients.len()];
            let from = stream.local_addr()?;
            Ok(self.inbound(&frame::tcp((from.ip(), from.port()), (to.ip(), to.port()), ACK, b"")))
        };
        (0..self.scale.single_runs()).map(frame).collect()
    }

    /// A packet of each of many flows that nobody has, out of a million.
    fn of_nobody(&self) -> Result<Vec<Vec<u8>>> {
        let mut random = Random(11);
        let frame = |_| {
            let number = random.next() >> 20;
            let address = IpAddr::from([10, 9, (number >> 16) as u8 & 15, 2]);
            self.client(SocketAddr::new(address, number as u16 | 1024), ACK)
        };
        (0..self.scale.single_runs()).map(frame).collect()
    }

    fn steady(&self, ends: [SocketAddr; 2], flows: &Flows, found: &mut Found) -> Result<()> {
        let uplink = Point::Uplink;
        let other =
            Ip { to: "10.77.0.1".parse()?, ..frame::udp((ends[0].ip(), 9), (ends[0].ip(), 9), &[0; 18]) };
        let reply = frame::tcp((SERVICE[0].parse()?, PORT), (ends[0].ip(), ends[0].port()), ACK, b"");
        for scene in [
            Scene { action: NEXT, ..Scene::new("not ours, v4", uplink, self.inbound(&other)) },
            Scene::new("steady TCP, v4", uplink, self.client(ends[0], ACK)?).at_most(STEADY_NS),
            Scene::new("steady TCP, v6", uplink, self.client(ends[1], ACK)?).at_most(STEADY_NS),
            Scene::new("steady UDP, v4", uplink, self.datagram(ends[0], ECHO)?).at_most(STEADY_NS),
            Scene {
                frames: self.of_flows(flows)?,
                single: true,
                ..Scene::new("steady TCP, v4, cold", uplink, Vec::new())
            },
            Scene::new("steady reply, TCP v4", Point::FromPartition, self.outbound(&reply)),
        ] {
            self.scene(&scene, found)?;
        }
        Ok(())
    }

    fn draining(
        &self,
        ends: [SocketAddr; 2],
        asking: SocketAddr,
        flows: &Flows,
        found: &mut Found,
    ) -> Result<()> {
        let uplink = Point::Uplink;
        let nobody = SocketAddr::new(ends[0].ip(), NOBODY);
        let to = [service(0, PORT)?, service(1, PORT)?];
        let connected = SocketAddr::new(CLIENT[0].parse()?, CONNECTED[1]);
        let reply = frame::tcp((SERVICE[0].parse()?, PORT), (ends[0].ip(), ends[0].port()), ACK, b"");
        let own = frame::udp((OWN_A[0].parse()?, ECHO), (asking.ip(), asking.port()), &[0; 18]);
        let scenes = [
            Scene::new("draining TCP owned, v4", uplink, self.client(ends[0], ACK)?),
            Scene::new("draining TCP owned, v6", uplink, self.client(ends[1], ACK)?),
            Scene::new("draining TCP unowned ACK, v4", uplink, self.client(nobody, ACK)?),
            Scene::new("draining TCP SYN, v4", uplink, self.client(nobody, SYN)?),
            Scene::new("draining TCP owned, v4, over lookup", uplink, self.client(ends[0], ACK)?)
                .over_lookup(ends[0], to[0]),
            Scene::new("draining TCP owned, v6, over lookup", uplink, self.client(ends[1], ACK)?)
                .over_lookup(ends[1], to[1]),
            Scene::new("draining TCP SYN, v4, over lookup", uplink, self.client(nobody, SYN)?)
                .over_lookup(nobody, to[0]),
            Scene {
                frames: self.of_flows(flows)?,
                single: true,
                ..Scene::new("draining TCP owned, v4, cold", uplink, Vec::new())
            },
            Scene {
                frames: self.of_nobody()?,
                single: true,
                ..Scene::new("draining TCP unowned ACK, v4, cold", uplink, Vec::new())
            },
            Scene::new("draining UDP learned, v4", uplink, self.datagram(asking, ECHO)?).at_most(UDP_NS),
            Scene::new("draining UDP connected, v4", uplink, self.datagram(connected, CONNECTED[0])?),
            Scene::new("draining UDP new, v4", uplink, self.datagram(nobody, ECHO)?),
            Scene::new("reply of the retiring, TCP v4", Point::FromPartition, self.outbound(&reply)),
            Scene {
                single: true,
                frames: vec![self.outbound(&own); self.scale.single_runs()],
                ..Scene::new("rewrite, UDP v4, one run a call", Point::FromPartition, Vec::new())
            }
            .at_most(REWRITE_NS),
        ];
        scenes.iter().try_for_each(|scene| self.scene(scene, found))
    }

    fn scene(&self, scene: &Scene, found: &mut Found) -> Result<()> {
        let on = if scene.point == Point::Uplink { self.uplink } else { self.link };
        let mut context = [0; CONTEXT];
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&on.index.to_ne_bytes());
        let (_, program) = self.programs.iter().find(|(point, _)| *point == scene.point).context("none")?;
        let lookup = match scene.against {
            Against::Empty => None,
            Against::Lookup(from, to) => Some(kernel::lookup(from, to, self.nsid)?),
        };
        let base = lookup.as_ref().unwrap_or(&self.empty).as_fd();
        let ours = program.fd()?.as_fd();
        let lab = crate::peers::Peer::lab(self.product);
        // Devices and namespace ids are those of the caller's namespace.
        let [blocks] = lab.host.enter(|| {
            pin_to(1)?;
            let ran = kernel::run(ours, &scene.frames[0], &context, 1)?;
            ensure!(ran.action == scene.action, "{}: action {}", scene.metric, ran.action);
            let run = |fd: BorrowedFd<'_>| self.run(scene, fd, &context).map(|ns| [ns]);
            abba(self.scale.ns_blocks(), &mut || run(base), &mut || run(ours))
        })?;
        let (peer, unit) = match scene.against {
            Against::Empty => ("empty", "ns over the empty program"),
            Against::Lookup(..) => ("lookup", "ns over lookup and release"),
        };
        let figure = Figure::difference(12, scene.metric, peer, unit, &blocks);
        found.add(match scene.limit {
            Some(limit) => figure.must(Target::AtMost(limit)),
            None => figure,
        });
        Ok(())
    }

    fn run(&self, scene: &Scene, program: BorrowedFd<'_>, context: &[u8]) -> Result<f64> {
        if !scene.single {
            return Ok(kernel::run(program, &scene.frames[0], context, self.scale.repeat())?.ns);
        }
        let ns = scene.frames.iter().map(|frame| Ok(kernel::run(program, frame, context, 1)?.ns));
        Ok(median(&ns.collect::<Result<Vec<_>>>()?))
    }
}

/// What the verifier reads, and how long that takes.
fn load(scale: Scale, found: &mut Found) -> Result<()> {
    const MOST: f64 = 50_000.0;
    const MS: f64 = 50.0;
    let mut times = [const { Vec::new() }; 3];
    let mut read = [0.0; 3];
    let mut whole = Vec::new();
    let object = dataplane::object()?;
    for _ in 0..scale.loads() {
        let begun = Instant::now();
        let mut ebpf = EbpfLoader::new()
            .override_global("HAS_SKIP_NEIGH", &1u32, true)
            .override_global("HAS_CSUM_IPV6", &1u32, true)
            .load(&object)?;
        for (index, point) in POINTS.into_iter().enumerate() {
            let program: &mut SchedClassifier =
                ebpf.program_mut(point.program()).context("no such program")?.try_into()?;
            let begun = Instant::now();
            program.load()?;
            times[index].push(begun.elapsed().as_secs_f64() * 1e3);
            read[index] = f64::from(program.info()?.verified_instruction_count().unwrap_or(0));
        }
        whole.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    for ((point, times), read) in POINTS.into_iter().zip(&times).zip(read) {
        let name = point.program();
        let instructions =
            Figure::values(22, &format!("{name}: read by the verifier"), PRODUCT, "instructions", &[read]);
        found.add(instructions.must(Target::AtMost(MOST)));
        let time = Figure::values(22, &format!("{name}: time to load"), PRODUCT, "ms", times);
        found.add(time.must(Target::AtMost(MS)));
    }
    found.add(Figure::values(22, "all programs and maps: time to load", PRODUCT, "ms", &whole));
    Ok(())
}

const POINTS: [Point; 3] = [Point::Uplink, Point::ToPartition, Point::FromPartition];
