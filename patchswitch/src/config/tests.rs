//! Every error has its place; every key has its effect.

use super::*;

const WEB: &str = r#"
[[service]]
name = "web"
addresses = ["192.0.2.10", "2001:db8::10"]
uplinks = ["eth0"]
partition = "web-a"

[[service.probe]]
kind = "http"
port = 80
"#;

fn error(text: &str) -> String {
    parse(text, "f.toml").unwrap_err().to_string()
}

/// The service of [`WEB`] with a line changed.
fn web(old: &str, new: &str) -> String {
    assert!(WEB.contains(old), "{old:?}");
    WEB.replacen(old, new, 1)
}

#[test]
fn a_small_file_is_completed_by_defaults() {
    let config = parse(WEB, "f.toml").unwrap();
    let service = &config.services[0];
    assert_eq!(service.name.as_str(), "web");
    assert_eq!(service.addresses, ["192.0.2.10".parse::<IpAddr>().unwrap(), "2001:db8::10".parse().unwrap()]);
    assert_eq!(service.gate, Gate::default());
    assert_eq!(service.drain.on_deadline, OnDeadline::Keep);
    assert_eq!(service.lossy_give_back, LossyGiveBack::Refuse);
    let port = NonZeroU16::new(80).unwrap();
    let probe = Probe::Http { port, path: "/".to_owned(), host: None, status: 200, contains: None };
    assert_eq!(service.probes, [probe]);
    assert_eq!(config.scan.on_failure, Policy::FailClosed);
}

#[test]
fn every_key_has_an_effect() {
    let text = r#"
schema = 1
[agent]
state_dir = "/srv/ps"
runtime = "runc"
[job]
boot = "1s"
patch = "2s"
restart = "3s"
stop = "4s"
keep_old = "5s"
copy = "18s"
store_lasts = "19s"
extend_stores = false
[scan]
packages = false
command = "true"
limit = "6s"
on_finding = "warn"
on_failure = "warn"
[gate]
need = 2
every = "7ms"
timeout = "8ms"
deadline = "9s"
[observe]
length = "10s"
every = "11ms"
fail = 3
of = 5
[drain]
command = "a"
deadline = "12s"
on_deadline = "abort"
[[service]]
name = "web"
addresses = ["192.0.2.10"]
uplinks = ["eth0", "eth1"]
partition = "web-a"
udp_idle = "1s"
may_lose = ["/var/log/**"]
lossy_give_back = "allow"
strategy = "quiesce"
stateless = [53, 123]
[service.quic]
port = 443
cid_offset = 1
cid_len = 2
mask = "ff80"
[service.quiesce]
finish = "e"
stop = "f"
start = "g"
hold = "13s"
[service.gate]
need = 4
[service.observe]
fail = 4
[service.drain]
on_deadline = "reset"
[[service.probe]]
kind = "tcp"
port = 1
[[service.probe]]
kind = "http"
port = 2
path = "/x"
host = "h"
status = 204
contains = "c"
[[service.probe]]
kind = "command"
command = "d"
"#;
    let config = parse(text, "f.toml").unwrap();
    let default = Config::default();
    assert_ne!(config.agent.state_dir, default.agent.state_dir);
    assert_eq!(config.agent.runtime, Runtime::Runc);
    let job = &config.job;
    assert_eq!(
        [job.boot, job.patch, job.restart, job.stop, job.keep_old, job.copy, job.store_lasts]
            .map(|d| d.as_secs()),
        [1, 2, 3, 4, 5, 18, 19]
    );
    assert!(!job.extend_stores && default.job.extend_stores);
    let scan = Scan {
        packages: false,
        command: Some("true".to_owned()),
        limit: Duration::from_secs(6),
        on_finding: Policy::Warn,
        on_failure: Policy::Warn,
    };
    assert_eq!(config.scan, scan);
    let service = &config.services[0];
    let millis = Duration::from_millis;
    assert_eq!(service.gate, Gate { need: 4, every: millis(7), timeout: millis(8), deadline: millis(9000) });
    assert_eq!(service.observe, Observe { length: millis(10_000), every: millis(11), fail: 4, of: 5 });
    let drain = Drain {
        command: Some("a".to_owned()),
        command_after: millis(10_000),
        deadline: millis(12_000),
        on_deadline: OnDeadline::Reset,
    };
    assert_eq!(service.drain, drain);
    assert_eq!(service.uplinks.len(), 2);
    assert_eq!(service.udp_idle, millis(1000));
    let quic = "443:1:2:ff80".parse().ok();
    assert_eq!(service.datagrams, Datagrams { stateless: vec![53, 123], quic });
    assert_eq!(service.may_lose, ["/var/log/**"]);
    assert_eq!(service.lossy_give_back, LossyGiveBack::Allow);
    let quiesce = Quiesce {
        finish: Some("e".to_owned()),
        stop: "f".to_owned(),
        start: "g".to_owned(),
        hold: millis(13_000),
    };
    assert_eq!(service.strategy, Strategy::Quiesce(quiesce));
    let (one, two) = (NonZeroU16::new(1).unwrap(), NonZeroU16::new(2).unwrap());
    let http = Probe::Http {
        port: two,
        path: "/x".to_owned(),
        host: Some("h".to_owned()),
        status: 204,
        contains: Some("c".to_owned()),
    };
    let command = Probe::Command { command: "d".to_owned() };
    assert_eq!(service.probes, [Probe::Tcp { port: one }, http, command]);
}

#[test]
fn a_strategy_has_the_table_that_it_needs_and_no_other() {
    let with = |text: &str| {
        parse(&format!("{WEB}{text}"), "f.toml").map(|config| config.services[0].strategy.clone())
    };
    let line = WEB.lines().count();
    let commands = "[service.quiesce]\nstop = \"a\"\nstart = \"b\"\n";
    let quiesces = web("name = \"web\"\n", "name = \"web\"\nstrategy = \"quiesce\"\n");
    let found = parse(&format!("{quiesces}{commands}"), "f.toml").unwrap().services[0].strategy.clone();
    let Strategy::Quiesce(found) = found else { panic!("{found:?}") };
    assert_eq!((found.finish, found.hold), (None, Duration::from_secs(30)));
    for (text, expected) in [
        (
            with(commands).unwrap_err(),
            format!("f.toml:{}:1: only strategy = \"quiesce\" has this table", line + 1),
        ),
        (
            parse(&quiesces, "f.toml").unwrap_err(),
            "it needs a table [service.quiesce] with stop and start".to_owned(),
        ),
        (
            parse(&format!("{quiesces}[service.quiesce]\nstop = \"a\"\n"), "f.toml").unwrap_err(),
            "missing field `start`".to_owned(),
        ),
        (
            parse(&format!("{quiesces}{commands}finish = \" \"\n"), "f.toml").unwrap_err(),
            "an empty command does nothing".to_owned(),
        ),
        (
            parse(&format!("{quiesces}{commands}hold = \"0s\"\n"), "f.toml").unwrap_err(),
            "the time must not be 0".to_owned(),
        ),
    ] {
        assert!(text.to_string().contains(&expected), "{text}: {expected}");
    }
}

#[test]
fn devices_and_addresses_go_over_with_or_without_their_table() {
    let with = |strategy: &str, table: &str, uplinks: &str| {
        let text = web("name = \"web\"\n", &format!("name = \"web\"\nstrategy = \"{strategy}\"\n"));
        parse(&format!("{}{table}", text.replace("uplinks = [\"eth0\"]", uplinks)), "f.toml")
    };
    let one = "uplinks = [\"eth0\"]";
    let exchange = |hold, on_deadline| Exchange { hold: Duration::from_secs(hold), on_deadline };
    let device = |table: &str| with("device", table, one).unwrap().services[0].strategy.clone();
    assert_eq!(device(""), Strategy::Device(exchange(30, Left::Abort)));
    let table = "[service.exchange]\nhold = \"5s\"\non_deadline = \"reset\"\n";
    assert_eq!(device(table), Strategy::Device(exchange(5, Left::Reset)));
    assert!(!device(table).is_shared() && device(table).hold() == Some(Duration::from_secs(5)));
    let two = with("address", table, "uplinks = [\"eth0\", \"eth1\"]").unwrap().services[0].strategy.clone();
    assert_eq!(two, Strategy::Address(exchange(5, Left::Reset)));
    for (found, words) in [
        (with("address", "", one), "from one uplink to another"),
        (with("takeover", table, one), "only strategy = \"device\" and \"address\" have this table"),
        (
            with("device", "[service.quiesce]\nstop = \"a\"\nstart = \"b\"\n", one),
            "only strategy = \"quiesce\"",
        ),
        (with("device", "[service.exchange]\nhold = \"0s\"\n", one), "f.toml:"),
        (with("device", "[service.exchange]\non_deadline = \"keep\"\n", one), "f.toml:"),
    ] {
        let error = found.unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn unknown_keys_are_errors_with_their_place_on_every_level() {
    let cases = [
        ("bogus = 1\n".to_owned(), "f.toml:1:1: unknown field `bogus`"),
        ("\n[job]\n  bot = \"1s\"\n".to_owned(), "f.toml:3:3: unknown field `bot`"),
        ("[jobs]\n".to_owned(), "f.toml:1:2: unknown field `jobs`"),
        (web("partition =", "colour = 1\npartition ="), "f.toml:6:1: unknown field `colour`"),
        (web("port = 80", "port = 80\nprot = 81"), "f.toml:11:1: unknown field `prot`"),
        (format!("{WEB}\n[service.drain]\ndead = \"1s\"\n"), "f.toml:13:1: unknown field `dead`"),
    ];
    for (text, expected) in cases {
        let error = error(&text);
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn bad_values_are_errors_with_their_place() {
    let cases = [
        ("[job]\nboot = 30\n".to_owned(), "f.toml:2:8: ", "length of time"),
        ("[job]\nboot = \"30\"\n".to_owned(), "f.toml:2:8: ", "lacks a unit"),
        ("[job]\nboot = \"0s\"\n".to_owned(), "f.toml:2:8: ", "must not be 0"),
        ("[job\n".to_owned(), "f.toml:1:5: ", ""),
        ("[scan]\non_finding = \"maybe\"\n".to_owned(), "f.toml:2:14: ", "fail_closed"),
        ("schema = 2\n".to_owned(), "f.toml:1:10: ", "schema 2 is unknown"),
        ("[agent]\nstate_dir = \"x\"\n".to_owned(), "f.toml:2:13: ", "slash"),
        (web("\"web\"", "\"Web\""), "f.toml:3:8: ", "is not a name"),
        (web("192.0.2.10", "192.0.2.256"), "f.toml:4:14: ", "invalid IP address"),
        (web("2001:db8::10", "::1"), "f.toml:4:28: ", "loopback"),
        (web("2001:db8::10", "fe80::2"), "f.toml:4:28: ", "link-local"),
        (web("2001:db8::10", "::ffff:192.0.2.9"), "f.toml:4:28: ", "IPv4 address in an IPv6 form"),
        (web("2001:db8::10", "192.0.2.10"), "f.toml:4:28: ", "twice"),
        (web("\"192.0.2.10\", \"2001:db8::10\"", ""), "f.toml:4:13: ", "at least one address"),
        (web("\"eth0\"", "\"a-name-too-long-for-linux\""), "f.toml:5:12: ", "network device"),
        (web("\"eth0\"", "\"eth0\", \"eth0\""), "f.toml:5:20: ", "twice"),
        (web("partition = \"web-a\"\n", ""), "f.toml:2:1: ", "missing field `partition`"),
        (web("port = 80\n", "port = 0\n"), "f.toml:10:8: ", "nonzero"),
        (web("port = 80\n", ""), "f.toml:9:8: ", "needs `port`"),
        (web("\"http\"\n", "\"tcp\"\npath = \"/\"\n"), "f.toml:10:8: ", "no effect"),
        (web("port = 80\n", "port = 80\npath = \"x\"\n"), "f.toml:11:8: ", "not a path"),
        (web("port = 80\n", "port = 80\nhost = \"a\\r\\nB: c\"\n"), "f.toml:11:8: ", "host name"),
        (web("port = 80\n", "port = 80\nstatus = 100\n"), "f.toml:11:10: ", "final answer"),
        (web("[[service.probe]]\nkind = \"http\"\nport = 80\n", ""), "f.toml:3:8: ", "no [[service.probe]]"),
        (web("uplinks", "stateless = [0]\nuplinks"), "f.toml:5:14: ", "nonzero"),
        (web("uplinks", "stateless = [1,2,3,4,5,6,7,8,9]\nuplinks"), "f.toml:5:13: ", "more than 8"),
        (
            web("uplinks", "stateless = [443]\nquic = { port = 443, cid_len = 8 }\nuplinks"),
            "f.toml:5:13: ",
            "cannot be declared",
        ),
        (web("uplinks", "quic = { port = 443, cid_len = 0 }\nuplinks"), "f.toml:5:8: ", "1 to 16"),
        (
            web("uplinks", "quic = { port = 443, cid_len = 1, mask = \"00\" }\nuplinks"),
            "f.toml:5:8: ",
            "no mask",
        ),
        (web("uplinks", "may_lose = [\"/a\", \"b\"]\nuplinks"), "f.toml:5:19: ", "absolute paths"),
    ];
    for (text, place, words) in cases {
        let error = error(&text);
        assert!(error.starts_with(place) && error.contains(words), "{text}\n{error}");
        assert_eq!(parse(&text, "f.toml").unwrap_err().exit_code(), ExitCode::Config);
    }
}

#[test]
fn timers_that_contradict_each_other_are_errors() {
    let cases = [
        ("[gate]\nneed = 5\nevery = \"2s\"\ndeadline = \"8s\"\n", "f.toml:4:12: the gate can never pass"),
        ("[gate]\ntimeout = \"2m\"\n", "f.toml:2:11: one probe may take 2m"),
        ("[gate]\nneed = 0\n", "f.toml:2:8: at least one success"),
        ("[observe]\nfail = 5\n", "f.toml:2:8: 5 failures of 4"),
        ("[observe]\nlength = \"900ms\"\n", "f.toml:2:10: 2 failures 500ms apart"),
        ("[drain]\ndeadline = \"5s\"\n", "f.toml:2:12: a UDP flow ends after 30s"),
    ];
    for (text, expected) in cases {
        let error = error(&format!("{text}{WEB}"));
        assert!(error.starts_with(expected), "{error}");
    }
    assert!(parse(&format!("[observe]\nlength = \"0s\"\n{WEB}"), "f.toml").is_ok(), "no observation at all");
}

#[test]
fn a_contradiction_between_two_files_is_found_where_the_later_one_stands() {
    let files = [("a.toml", WEB), ("b.toml", "\n\n[gate]\ndeadline = \"1s\"\n")];
    let error = parse_all(files).unwrap_err().to_string();
    assert!(error.starts_with("b.toml:4:12: the gate can never pass"), "{error}");
}

#[test]
fn what_two_services_may_not_share_is_reported_with_both_places() {
    let other = |from: &str, to: &str| {
        let other = WEB
            .replace("\"web\"", "\"api\"")
            .replace("web-a", "api-a")
            .replace("2.10", "2.11")
            .replace("::10", "::11");
        assert!(other.contains(from));
        parse_all([("a.toml", WEB), ("b.toml", &other.replace(from, to))])
    };
    assert_eq!(other("eth0", "eth0").unwrap().services.len(), 2);
    for (from, to, expected) in [
        ("\"api\"", "\"web\"", "b.toml:3:8: service \"web\" is given twice, first at a.toml:3:8"),
        ("api-a", "web-a", "b.toml:6:13: partition \"web-a\" is given twice, first at a.toml:6:13"),
        (
            "2001:db8::11",
            "2001:db8::10",
            "b.toml:4:28: address 2001:db8::10 is given twice, first at a.toml:4:28",
        ),
    ] {
        assert_eq!(other(from, to).unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_service_survives_the_store_and_is_checked_without_a_file() {
    let mut service = parse(WEB, "f.toml").unwrap().services.remove(0);
    let json = serde_json::to_string(&service).unwrap();
    assert!(json.contains("\"every\":\"1s\""), "{json}");
    assert_eq!(serde_json::from_str::<Service>(&json).unwrap(), service);
    service.gate.need = 0;
    assert_eq!(service.check().unwrap_err().to_string(), "gate.need: at least one success is needed");
}

proptest::proptest! {
    #[test]
    fn no_text_is_a_panic(text in ".{0,200}", cut in 0..WEB.len()) {
        let _ = parse(&text, "f.toml");
        let mut mixed = WEB.to_owned();
        mixed.insert_str(cut, &text);
        let _ = parse(&mixed, "f.toml");
    }
}

#[test]
fn addresses_that_no_router_delivers_to_are_refused() {
    for bad in [
        "127.0.0.1",
        "0.0.0.0",
        "0.1.2.3",
        "169.254.1.1",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::",
        "::1",
        "fe80::1",
        "ff02::1",
        "::ffff:192.0.2.1",
    ] {
        assert!(super::undeliverable(&bad.parse().unwrap()).is_some(), "{bad}");
    }
    for good in ["192.0.2.80", "10.0.0.1", "2001:db8::80", "fd00::1"] {
        assert!(super::undeliverable(&good.parse().unwrap()).is_none(), "{good}");
    }
}
