//! The load client between network namespaces: what it says of real networks.

use std::net::IpAddr;
use std::time::Duration;

use patchswitch_load::client::{self, Settings};
use patchswitch_load::echo;
use patchswitch_load::record::{Class, ErrorKind, Family};
use patchswitch_load::report::Run;
use patchswitch_tests::netlab::{CLIENT, HOST, Ns, OWN_A, SERVICE, SwitchLab, UPLINK};
use tokio::sync::mpsc::unbounded_channel;

const PORT: u16 = 7007;

fn echo_in(ns: &Ns) {
    let sockets = ns.enter(|| Ok(echo::bind(PORT)?)).unwrap();
    // Ends with the test's process: its sockets stay in the namespace, which is gone by name before.
    std::thread::spawn(move || echo::serve(sockets, "host"));
}

fn settings(targets: [&str; 2]) -> Settings {
    Settings {
        rate: 0.0,
        udp_rate: 100.0,
        udp_port: Some(PORT),
        duration: Some(Duration::from_millis(400)),
        ..Settings::new(targets.map(|target| target.parse::<IpAddr>().unwrap()).to_vec(), 80)
    }
}

fn run_in(ns: &Ns, settings: Settings) -> Run {
    ns.enter(|| Ok(client::run(settings, unbounded_channel().1)?)).unwrap()
}

#[test]
fn a_wildcard_socket_behind_two_addresses_answers_from_the_wrong_one_and_is_caught() {
    let lab = SwitchLab::new("wild").unwrap();
    // The host holds the service address, but leaves by its own: just as the retiring partition does.
    let [v4, v6] = SERVICE;
    let [own4, own6] = OWN_A;
    lab.host
        .ip_batch(&format!(
            "addr add {v4}/32 dev {UPLINK}\naddr add {v6}/128 dev {UPLINK} nodad\n\
             addr add {own4}/32 dev {UPLINK}\naddr add {own6}/128 dev {UPLINK} nodad\n\
             route replace {}/32 dev {UPLINK} src {own4}\nroute replace {}/128 dev {UPLINK} src {own6}\n",
            CLIENT[0], CLIENT[1]
        ))
        .unwrap();
    echo_in(&lab.host);
    let run = run_in(&lab.client, settings(SERVICE));
    let stats = run.stats(run.whole());
    assert!(stats.requests >= 40 && stats.failed == stats.requests, "{stats:?}");
    for failure in &run.failures {
        let own: IpAddr = if failure.family == Family::V4 { own4 } else { own6 }.parse().unwrap();
        assert_eq!(failure.error, ErrorKind::WrongSource((own, PORT).into()));
        assert_eq!(failure.instance.as_deref(), Some("host"), "the answer came, but from a stranger");
    }
    // The same service, asked by its own address, is fine.
    let run = run_in(&lab.client, settings(OWN_A));
    assert_eq!(run.failures, []);
    assert_eq!(
        run.stats(run.whole()).series.iter().filter(|s| s.class == Class::Udp && s.requests > 0).count(),
        2
    );
}

#[test]
fn a_network_without_a_way_is_unreachable() {
    let lab = SwitchLab::new("noway").unwrap();
    let run = run_in(&lab.a, Settings { rate: 50.0, ..settings(HOST) });
    assert!(run.failures.len() >= 60 && run.failures.len() as u64 == run.stats(run.whole()).requests);
    assert!(
        run.failures.iter().all(|failure| failure.error == ErrorKind::Unreachable),
        "{:?}",
        run.failures[0]
    );
}
