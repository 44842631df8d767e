//! Neighbours that knew the address elsewhere learn where it is.

use std::time::{Duration, Instant};

use patchswitch_tests::netlab::{CLIENT_LINK, Ns, SERVICE, UPLINK};
use patchswitch_tests::programs;

use crate::ask::who;
use crate::rig::{NAME, Rig, Server, ends};

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
    rig.ok(&["detach", NAME]).unwrap();
    attach_says_it_again(&rig, mac);
    for address in SERVICE {
        client.ip(&format!("neigh del {address} dev {CLIENT_LINK}")).unwrap();
    }
    rig.finish().unwrap();
}

/// What is misled after the first announcement hears one of the others, which come a second apart.
fn attach_says_it_again(rig: &Rig, mac: &str) {
    let client = &rig.lab.client;
    let program = programs::built("patchswitch").unwrap();
    let mut argv = vec![program.to_string_lossy().into_owned()];
    argv.extend(rig.attach_arguments());
    let times = argv.iter().position(|word| word == "--announce").unwrap() + 1;
    argv[times] = "4".to_owned();
    mislead(client);
    let begin = Instant::now();
    let attach = rig.lab.host.spawn(&argv.iter().map(String::as_str).collect::<Vec<_>>(), None).unwrap();
    while known(client) != [mac; 2] {
        assert!(begin.elapsed() < Duration::from_secs(10), "nothing was announced");
        std::thread::sleep(Duration::from_millis(20));
    }
    mislead(client);
    assert!(attach.wait(Duration::from_secs(20)).unwrap().success());
    assert_eq!(known(client), [mac; 2]);
}
