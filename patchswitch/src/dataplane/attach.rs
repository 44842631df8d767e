//! The hooks: TCX where the kernel has it (6.6), a filter of a `clsact` qdisc before; XDP in addition, if wanted.
//!
//! A link of TCX or XDP is pinned, and its pin is what holds it. A filter has a fixed priority and a handle made of the
//! attachment's name, so that it can be found and removed without any record.

use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact};
use aya::programs::{Link, LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType, TcError};
use aya::util::KernelVersion;
use serde::{Deserialize, Serialize};

use super::load::{open, refused};
use super::{DataplaneError, xdp};

/// Priority of our filters; the kernel gives 49152 to those who ask for none.
const PRIORITY: u16 = 49_300;

/// Where a program sits on the path of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Point {
    /// Ingress of an uplink.
    Uplink,
    /// Egress of a partition's host-side link.
    ToPartition,
    /// Ingress of a partition's host-side link.
    FromPartition,
    /// Ingress of an uplink by XDP, before [`Point::Uplink`].
    Xdp,
}

impl Point {
    const ALL: [Self; 4] = [Self::Uplink, Self::ToPartition, Self::FromPartition, Self::Xdp];

    /// The points of an attachment, with XDP or without.
    pub(super) fn all(xdp: bool) -> &'static [Self] {
        if xdp { &Self::ALL } else { &Self::ALL[..3] }
    }

    /// The program's name in the kernel.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Uplink => "ps_uplink",
            Self::ToPartition => "ps_to_part",
            Self::FromPartition => "ps_from_part",
            Self::Xdp => "ps_xdp",
        }
    }

    const fn direction(self) -> TcAttachType {
        match self {
            Self::Uplink | Self::FromPartition | Self::Xdp => TcAttachType::Ingress,
            Self::ToPartition => TcAttachType::Egress,
        }
    }
}

/// What a program is attached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HookKind {
    /// A BPF link on the TCX hook.
    Tcx,
    /// A filter of the `clsact` qdisc.
    Clsact,
    /// A BPF link on the XDP hook, in the driver. Only uplinks have it, beside one of the others.
    Xdp,
}

impl HookKind {
    /// The best that this kernel has.
    pub fn of_this_kernel() -> Self {
        let has_tcx = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
        if has_tcx { Self::Tcx } else { Self::Clsact }
    }
}

/// One program on one link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// What it does there.
    pub point: Point,
    /// The link's name.
    pub link: String,
    /// How it is attached.
    pub kind: HookKind,
}

impl Hook {
    /// The BPF file system keeps names with a dot for itself, and VLANs have one (`eth0.7`). No link has a colon in its
    /// name, so no two share a pin.
    pub(super) fn pin(&self, directory: &Path) -> std::path::PathBuf {
        directory.join("links").join(format!("{}@{}", self.point.program(), self.link.replace('.', ":")))
    }
}

pub(super) fn attach(directory: &Path, hook: &Hook) -> Result<(), DataplaneError> {
    let name = hook.point.program();
    if hook.kind == HookKind::Xdp {
        return xdp::attach(directory, hook);
    }
    let failed = |error: ProgramError| refused("attach", name, &error);
    let mut program = open(directory, hook.point)?;
    match hook.kind {
        HookKind::Tcx | HookKind::Xdp => {
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            let id =
                program.attach_with_options(&hook.link, hook.point.direction(), options).map_err(failed)?;
            let link = program.take_link(id).map_err(failed)?;
            let unpinned = |reason: String| DataplaneError::Program {
                action: "pin the link of",
                program: name.to_owned(),
                reason,
            };
            let link = FdLink::try_from(link).map_err(|error| unpinned(error.to_string()))?;
            link.pin(hook.pin(directory)).map_err(|error| unpinned(error.to_string()))?;
        }
        HookKind::Clsact => {
            add_clsact(&hook.link).map_err(|error| failed(error.into()))?;
            let options =
                NlOptions { priority: PRIORITY, handle: handle(directory, hook.point), classid: None };
            let options = TcAttachOptions::Netlink(options);
            let id =
                program.attach_with_options(&hook.link, hook.point.direction(), options).map_err(failed)?;
            // A filter stays when its owner goes; the library would remove it with this value.
            std::mem::forget(program.take_link(id).map_err(failed)?);
        }
    }
    Ok(())
}

/// Puts a program into the place of the one that is attached, at once.
pub(super) fn update(directory: &Path, hook: &Hook, program: &mut Program) -> Result<(), DataplaneError> {
    match program {
        Program::Xdp(program) => xdp::update(directory, hook, program),
        Program::SchedClassifier(program) => update_filter(directory, hook, program),
        _ => Err(DataplaneError::Missing(format!("program {}", hook.point.program()))),
    }
}

fn update_filter(directory: &Path, hook: &Hook, program: &mut SchedClassifier) -> Result<(), DataplaneError> {
    let failed = |error: ProgramError| refused("replace", hook.point.program(), &error);
    let link = match hook.kind {
        HookKind::Tcx | HookKind::Xdp => {
            let opened = PinnedLink::from_pin(hook.pin(directory)).map(FdLink::from);
            let link = opened.and_then(SchedClassifierLink::try_from);
            link.map_err(|error| DataplaneError::Program {
                action: "open the link of",
                program: hook.point.program().to_owned(),
                reason: error.to_string(),
            })?
        }
        HookKind::Clsact => {
            let handle = handle(directory, hook.point);
            SchedClassifierLink::attached(&hook.link, hook.point.direction(), PRIORITY, handle, None)
                .map_err(|error| failed(TcError::IoError(error).into()))?
        }
    };
    let id = program.attach_to_link(link).map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    if hook.kind == HookKind::Clsact {
        // A filter stays when its owner goes; the library would remove it with this value.
        std::mem::forget(link);
    }
    Ok(())
}

pub(super) fn detach(directory: &Path, hook: &Hook) -> Result<(), DataplaneError> {
    match hook.kind {
        HookKind::Tcx | HookKind::Xdp => {
            let pin = hook.pin(directory);
            match PinnedLink::from_pin(&pin) {
                Ok(link) => link.unpin().map(drop).map_err(|source| DataplaneError::File {
                    action: "remove pin",
                    path: pin,
                    source,
                }),
                Err(_) if !pin.exists() => Ok(()),
                Err(error) => Err(DataplaneError::Program {
                    action: "open the link of",
                    program: hook.point.program().to_owned(),
                    reason: error.to_string(),
                }),
            }
        }
        HookKind::Clsact => detach_filter(directory, hook),
    }
}

fn detach_filter(directory: &Path, hook: &Hook) -> Result<(), DataplaneError> {
    let handle = handle(directory, hook.point);
    let link = SchedClassifierLink::attached(&hook.link, hook.point.direction(), PRIORITY, handle, None);
    // The device is gone, and its filters with it.
    let Ok(link) = link else { return Ok(()) };
    match link.detach() {
        Err(ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)))
            if is_absent(error.raw_os_error()) =>
        {
            Ok(())
        }
        other => other.map_err(|error| refused("detach", hook.point.program(), &error)),
    }
}

/// No such filter, no such qdisc, no such device.
fn is_absent(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::ENOENT | libc::EINVAL | libc::ENODEV))
}

fn add_clsact(link: &str) -> Result<(), TcError> {
    match qdisc_add_clsact(link) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// A handle of its own for each attachment and point. Several attachments share an uplink and our priority.
fn handle(directory: &Path, point: Point) -> TcHandle {
    use sha2::{Digest, Sha256};
    let mut digest = Sha256::new();
    digest.update(directory.as_os_str().as_encoded_bytes());
    digest.update(point.program());
    let digest = digest.finalize();
    // Zero would mean "choose one".
    TcHandle::new(u16::from_be_bytes([digest[0], digest[1]]), u16::from_be_bytes([digest[2], digest[3]]) | 1)
}
