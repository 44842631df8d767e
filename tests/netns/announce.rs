//! Neighbours that knew the address elsewhere learn where it is.

use patchswitch_tests::netlab::{CLIENT_LINK, Ns, SERVICE, UPLINK};

use crate::ask::who;
use crate::rig::{Rig, Server, ends};

/// A host that is not there.
const ELSEWHERE: &str = "02:00:00:00:99:99";

/// The link-layer addresses to which a neighbour sends what is for the service.
fn known(ns: &Ns) -> Vec<String> {
    let mac = |address: &&str| {
        let line = ns.ip(&format!("neigh show {address} dev {CLIENT_LINK}")).unwrap();
        let mut words = line.split_whitespace().skip_while(|word| *word != "lladdr");
        words.nth(1).unwrap_or_default().to_owned()
    };
    SERVICE.iter().map(mac).collect()
}

/// Makes a neighbour sure that the service is elsewhere.
fn mislead(ns: &Ns) {
    for address in SERVICE {
        ns.ip(&format!("neigh replace {address} lladdr {ELSEWHERE} dev {CLIENT_LINK} nud reachable"))
            .unwrap();
    }
    assert_eq!(known(ns), [ELSEWHERE; 2]);
}

#[test]
fn a_neighbour_that_knew_the_address_elsewhere_finds_it_at_once() {
    let rig = Rig::new("announce").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    let client = &rig.lab.client;
    let link = rig.lab.host.ip(&format!("-o link show {UPLINK}")).unwrap();
    let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
    assert_ne!(mac, ELSEWHERE);
    mislead(client);
    rig.attach().unwrap();
    assert_eq!(known(client), [mac; 2]);
    for end in ends() {
        assert_eq!(who(client, end).unwrap(), "a");
    }
    // Once more, for who has not heard it the first time.
    mislead(client);
    rig.with(async |attachment| {
        attachment.announce().await;
        Ok(())
    })
    .unwrap();
    assert_eq!(known(client), [mac; 2]);
    for address in SERVICE {
        client.ip(&format!("neigh del {address} dev {CLIENT_LINK}")).unwrap();
    }
    rig.finish().unwrap();
}
