//! XDP at the uplinks: when it is sane, what it needs, and what is said about the choice.
//!
//! TC stays on every uplink. It gets what XDP passes on, and is what `auto` chooses: only TC sees what a card has joined
//! and summed, and on a virtual device the packet is the kernel's buffer already when XDP gets it.

use super::record::Record;
use super::{AttachError, Spec, build};
use crate::dataplane::{Dataplane, DataplaneError, HookKind};
use crate::host::linux::ethtool;
use crate::host::linux::netlink::Link;
use crate::host::linux::netns::Netns;

/// The links of a request, by name.
fn uplinks<'a>(spec: &'a Spec, links: &'a [Link]) -> impl Iterator<Item = &'a Link> {
    links.iter().filter(|link| spec.uplinks.contains(&link.name))
}

/// What can be known of XDP before anything is changed.
pub(super) fn check(spec: &Spec, links: &[Link]) -> Result<(), AttachError> {
    if spec.hook != Some(HookKind::Xdp) {
        return Ok(());
    }
    for link in uplinks(spec, links) {
        // A device that cannot say is asked for nothing more: the attachment itself tells.
        let takes_tags_out = ethtool::takes_tags_out(&link.name).unwrap_or_default();
        if let Some(reason) = obstacle(link, takes_tags_out) {
            let link = link.name.clone();
            return Err(DataplaneError::Xdp { link, reason }.into());
        }
        if is_virtual(link) {
            tracing::warn!("{}", on_virtual(link));
        }
    }
    Ok(())
}

/// What makes XDP impossible on a device, or wrong.
fn obstacle(link: &Link, takes_tags_out: bool) -> Option<String> {
    if link.xdp {
        return Some(format!(
            "another XDP program is there already, and a device has room for one (`ip link show dev {}`)",
            link.name
        ));
    }
    // A virtual device has no card that could; there it is the sender who leaves tags beside the frame.
    (takes_tags_out && !is_virtual(link)).then(|| {
        format!(
            "it takes the tags of VLANs out of frames before XDP sees them, which would serve every VLAN (`ethtool -K \
             {} rxvlan off`)",
            link.name
        )
    })
}

/// A bond is as good as its cards.
fn is_virtual(link: &Link) -> bool {
    link.kind.as_deref().is_some_and(|kind| kind != "bond" && kind != "team")
}

fn on_virtual(link: &Link) -> String {
    format!(
        "{} is a virtual device ({}): XDP takes packets there without the sums and tags that their sender has left to its \
         card; switch that off at its other end (`ethtool -K … tx off txvlan off`), or use --hook tc",
        link.name,
        link.kind.as_deref().unwrap_or_default()
    )
}

/// Why the programs are where they are, for people.
pub(super) fn reason(spec: &Spec, links: &[Link]) -> String {
    match spec.hook {
        Some(HookKind::Xdp) => "asked for: in the driver, and TC for what XDP leaves to it".to_owned(),
        Some(HookKind::Tcx | HookKind::Clsact) => "asked for".to_owned(),
        None => {
            let reasons: Vec<_> = uplinks(spec, links).map(reason_for_tc).collect();
            reasons.join("; ")
        }
    }
}

fn reason_for_tc(link: &Link) -> String {
    let name = &link.name;
    if is_virtual(link) {
        let kind = link.kind.as_deref().unwrap_or_default();
        return format!(
            "{name} is virtual ({kind}), where XDP comes no earlier and loses sums and joined segments"
        );
    }
    format!(
        "on {name} only TC gets what the card joins and sums; if its driver has native XDP, --hook xdp takes packets \
         earlier, each by itself, and summed by the processor"
    )
}

/// Makes the link inside a partition take what XDP redirects to the veth.
pub(super) fn receive(record: &Record, netns: &Netns, link: &str) -> Result<(), AttachError> {
    if !record.xdp {
        return Ok(());
    }
    let joined = netns.run(|| ethtool::join_received(link))?;
    joined.map_err(|source| AttachError::Receive { link: link.to_owned(), netns: netns.to_string(), source })
}

/// Sends frames to every partition that is there; nobody's clients depend on XDP before they have arrived.
pub(super) fn self_test(record: &Record, plane: &Dataplane) -> Result<(), AttachError> {
    if !record.xdp {
        return Ok(());
    }
    build::with_all_ends(record, |ends| Ok(plane.self_test_xdp(ends)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Name;

    fn link(kind: Option<&str>) -> Link {
        Link {
            index: 2,
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            up: true,
            loopback: false,
            ethernet: true,
            kind: kind.map(str::to_owned),
            xdp: false,
            peer: None,
        }
    }

    fn spec(hook: Option<HookKind>) -> Spec {
        Spec {
            name: Name::new("web").unwrap(),
            addresses: Vec::new(),
            uplinks: vec!["eth0".to_owned()],
            udp_idle: super::super::UDP_IDLE,
            datagrams: crate::config::Datagrams::default(),
            hook,
            of_service: false,
            own_uplinks: false,
            with: None,
        }
    }

    #[test]
    fn a_card_that_hides_tags_and_a_place_that_is_taken_are_obstacles() {
        assert_eq!(obstacle(&link(None), false), None);
        assert!(obstacle(&link(None), true).unwrap().contains("ethtool -K eth0 rxvlan off"));
        assert!(obstacle(&link(Some("bond")), true).is_some());
        assert_eq!(obstacle(&link(Some("veth")), true), None);
        let taken = Link { xdp: true, ..link(None) };
        assert!(obstacle(&taken, false).unwrap().contains("another XDP program"));
    }

    #[test]
    fn the_choice_is_explained() {
        let of = |hook, kind| reason(&spec(hook), &[link(kind)]);
        assert!(of(None, Some("veth")).contains("virtual (veth)"));
        assert!(of(None, None).contains("--hook xdp"));
        assert!(of(None, Some("bond")).contains("--hook xdp"));
        assert_eq!(of(Some(HookKind::Clsact), None), "asked for");
        assert!(of(Some(HookKind::Xdp), None).contains("driver"));
    }
}
