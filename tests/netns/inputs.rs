//! Bad input and a host that changes under the product: a clear error, and nothing changed or nothing left.

use std::fs;
use std::path::Path;

use patchswitch_tests::leftovers::Leftover;
use patchswitch_tests::netlab::{HOST, SERVICE, UPLINK};
use patchswitch_tests::programs;

use crate::ask::who;
use crate::rig::{NAME, Rig, Server, ends};

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_changed() {
    let rig = Rig::new("refuse").unwrap();
    let (a, b) = (rig.lab.a.name(), rig.lab.b.name());
    let host = format!("/run/netns/{}", rig.lab.host.name());
    let file = tempfile::NamedTempFile::new().unwrap();
    let plain = file.path().to_string_lossy();
    let [v4, v6] = SERVICE;
    for (what, address, uplink, first, second, word) in [
        ("an uplink that does not exist", v4, "nowhere0", a, b, "no network device \"nowhere0\""),
        ("an uplink without clients", v4, "lo", a, b, "lo"),
        ("an address of the host", HOST[0], UPLINK, a, b, "belongs to this host"),
        ("an IPv6 address of the host", HOST[1], UPLINK, a, b, "belongs to this host"),
        ("a loopback address", "127.0.0.1", UPLINK, a, b, "cannot be an address"),
        ("a multicast address", "ff02::1", UPLINK, a, b, "cannot be an address"),
        ("one namespace twice", v4, UPLINK, a, a, "same network namespace"),
        ("the host's own namespace", v6, UPLINK, &host, b, "host's own network namespace"),
        ("a namespace that does not exist", v4, UPLINK, a, "nobody", "nobody"),
        ("a process that does not exist", v4, UPLINK, "pid:4194304", b, "pid:4194304"),
        ("a file that is none", v4, UPLINK, a, plain.as_ref(), "is not a network namespace"),
        ("a namespace of another kind", v4, UPLINK, a, "/proc/self/ns/mnt", "is not a network namespace"),
    ] {
        let arguments = ["attach", NAME, "--address", address, "--uplink", uplink, first, second];
        let text = rig.refused(&arguments, 1).unwrap();
        assert!(text.contains(word), "{what}: {text}");
        rig.nothing_left().unwrap();
    }
    // What is no name, no address or no namespace does not get past the command line.
    for arguments in [
        ["attach", "../web", "--address", v4, "--uplink", UPLINK, a, b],
        ["attach", "a/b", "--address", v4, "--uplink", UPLINK, a, b],
        ["attach", "", "--address", v4, "--uplink", UPLINK, a, b],
        ["attach", NAME, "--address", "10.77.0.999", "--uplink", UPLINK, a, b],
        ["attach", NAME, "--address", v4, "--uplink", UPLINK, "../a", b],
        ["attach", NAME, "--address", v4, "--uplink", UPLINK, a, ".."],
    ] {
        rig.refused(&arguments, 2).unwrap();
    }
    rig.refused(&["switch", "../web"], 2).unwrap();
    let twice = ["attach", NAME, "--address", v4, "--address", v4, "--uplink", UPLINK, a, b];
    assert!(rig.refused(&twice, 1).unwrap().contains("given twice"));
    rig.nothing_left().unwrap();
}

#[test]
fn doing_it_twice_is_no_harm() {
    let rig = Rig::new("twice").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    assert_eq!(rig.ok(&["detach", NAME]).unwrap()["changed"], false);
    rig.refused(&["switch", NAME], 1).unwrap();
    rig.refused(&["drain", NAME], 1).unwrap();
    rig.attach().unwrap();
    let arguments = rig.attach_arguments();
    let again: Vec<&str> = arguments.iter().map(String::as_str).collect();
    assert!(rig.refused(&again, 73).unwrap().contains("is attached already"));
    // The same address under another name.
    let (a, b) = (rig.lab.a.name(), rig.lab.b.name());
    let text =
        rig.refused(&["attach", "other", "--address", SERVICE[0], "--uplink", UPLINK, a, b], 1).unwrap();
    assert!(text.contains("attached already, as web"), "{text}");
    let same = rig.ok(&["switch", NAME, "--to", a]).unwrap();
    assert_eq!(same["changed"], false, "{same}");
    let generation = |rig: &Rig| rig.ok(&["status", NAME]).unwrap()["attachments"][0]["generation"].clone();
    let before = generation(&rig);
    assert_eq!(rig.ok(&["switch", NAME, "--to", a]).unwrap()["changed"], false);
    assert_eq!(generation(&rig), before);
    let text = rig.refused(&["switch", NAME, "--to", "nobody"], 1).unwrap();
    assert!(text.contains(a) && text.contains(b), "names who is there: {text}");
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
    assert_eq!(rig.ok(&["detach", NAME, "--force"]).unwrap()["changed"], true);
    assert_eq!(rig.ok(&["detach", NAME]).unwrap()["changed"], false);
    rig.nothing_left().unwrap();
}

#[test]
fn a_filter_of_somebody_else_stays() {
    let mut rig = Rig::new("foreign").unwrap();
    rig.lab.host.run(&["tc", "qdisc", "add", "dev", UPLINK, "clsact"]).unwrap();
    // Classic BPF that passes everything on: `ret 0`, no match.
    let filter = ["tc", "filter", "add", "dev", UPLINK, "ingress", "pref", "7", "protocol", "all", "bpf"];
    rig.lab.host.run(&[filter.as_slice(), &["bytecode", "1,6 0 0 0"]].concat()).unwrap();
    let show = ["tc", "filter", "show", "dev", UPLINK, "ingress"];
    let before = rig.lab.host.run(&show).unwrap();
    assert!(before.contains("pref 7 bpf"), "{before}");
    rig.furnished().unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    assert_eq!(rig.lab.host.run(&show).unwrap(), before);
    // Nor is any other discipline or filter gone or come.
    rig.nothing_left().unwrap();
}

#[test]
fn flows_are_not_cut_by_a_detach_that_was_not_forced() {
    let rig = Rig::new("cut").unwrap();
    let _server = Server::start(&rig.lab.a, "a").unwrap();
    rig.attach().unwrap();
    let mut asking = crate::ask::Asking::from(&rig.lab.client, ends()[0]).unwrap();
    assert_eq!(asking.who().unwrap(), "a");
    let text = rig.refused(&["detach", NAME], 1).unwrap();
    assert!(text.contains("still has 1 flow"), "{text}");
    assert_eq!(asking.who().unwrap(), "a");
    drop(asking);
    rig.finish().unwrap();
}

#[test]
fn who_is_not_root_is_told_so() {
    let rig = Rig::new("nobody").unwrap();
    // Where nobody can execute it.
    let directory = tempfile::tempdir().unwrap();
    rustix::fs::chmod(directory.path(), rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    let program = directory.path().join("patchswitch");
    fs::copy(programs::built("patchswitch").unwrap(), &program).unwrap();
    let program = program.to_string_lossy();
    let (a, b) = (rig.lab.a.name(), rig.lab.b.name());
    for verb in [
        &["attach", NAME, "--address", SERVICE[0], "--uplink", UPLINK, a, b][..],
        &["switch", NAME],
        &["drain", NAME],
        &["flows", NAME],
        &["detach", NAME],
    ] {
        let argv = [&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", program.as_ref()], verb]
            .concat();
        let ended = rig.lab.host.output(&argv).unwrap();
        assert_eq!(ended.status.code(), Some(77), "{verb:?}: {ended:?}");
        assert!(ended.stderr.contains("root"), "{verb:?}: {}", ended.stderr);
    }
    rig.nothing_left().unwrap();
    // What he may not look at he is not told to be broken.
    rig.attach().unwrap();
    let argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", program.as_ref(), "status"];
    let ended = rig.lab.host.output(&argv).unwrap();
    assert_eq!(ended.status.code(), Some(77), "{ended:?}");
    rig.finish().unwrap();
}

/// Nothing is left but what the test itself took away.
fn only_gone(left: &[Leftover]) -> bool {
    left.iter().all(|one| one.after.is_none())
}

#[test]
fn an_uplink_that_goes_away_can_be_detached() {
    let mut rig = Rig::new("unplug").unwrap();
    // What the host's own clients have as their address when the uplink and its addresses are gone.
    rig.lab.host.ip_batch("addr add 10.55.0.1/32 dev lo\naddr add fd55::1/128 dev lo\n").unwrap();
    rig.furnished().unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    rig.lab.host.ip(&format!("link del {UPLINK}")).unwrap();
    rig.ok(&["status", NAME]).unwrap();
    rig.switch_to(&rig.lab.b).unwrap();
    // Clients on the host are served all the same.
    for end in ends() {
        assert_eq!(who(&rig.lab.host, end).unwrap(), "b");
    }
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    let left = rig.left().unwrap();
    assert!(only_gone(&left), "{left:?}");
}

#[test]
fn a_namespace_whose_name_goes_away_lives_as_long_as_it_is_attached() {
    let rig = Rig::new("unname").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    programs::run(&["ip", "netns", "del", rig.lab.b.name()]).unwrap();
    rig.switch_to(&rig.lab.b).unwrap();
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "b");
    }
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    let left = rig.left().unwrap();
    assert!(only_gone(&left), "{left:?}");
    programs::run(&["ip", "netns", "add", rig.lab.b.name()]).unwrap();
}

#[test]
fn pins_that_go_away_are_noticed_and_the_rest_is_detached() {
    let rig = Rig::new("unpin").unwrap();
    rig.attach().unwrap();
    fs::remove_dir_all("/sys/fs/bpf/patchswitch").unwrap();
    assert_eq!(rig.ok(&["status"]).unwrap()["attachments"][0]["phase"], "broken");
    rig.refused(&["switch", NAME], 1).unwrap();
    let arguments = rig.attach_arguments();
    let again: Vec<&str> = arguments.iter().map(String::as_str).collect();
    assert!(rig.refused(&again, 73).unwrap().contains("patchswitch detach web"));
    assert_eq!(rig.ok(&["detach", NAME]).unwrap()["changed"], true);
    rig.nothing_left().unwrap();
}

#[test]
fn a_record_that_goes_away_is_made_up_for_by_the_pins() {
    let rig = Rig::new("unwrite").unwrap();
    rig.attach().unwrap();
    fs::remove_file("/run/patchswitch/attachments/web.json").unwrap();
    assert_eq!(rig.ok(&["detach", NAME]).unwrap()["changed"], true);
    rig.nothing_left().unwrap();
    assert!(!Path::new("/run/patchswitch").exists());
}

#[test]
fn a_record_that_cannot_be_read_is_named() {
    let rig = Rig::new("garbled").unwrap();
    rig.attach().unwrap();
    let path = "/run/patchswitch/attachments/web.json";
    let text = fs::read(path).unwrap();
    fs::write(path, &text[..text.len() / 2]).unwrap();
    for verb in [&["status"][..], &["switch", NAME], &["detach", NAME]] {
        assert!(rig.refused(verb, 1).unwrap().contains(path));
    }
    fs::write(path, &text).unwrap();
    rig.finish().unwrap();
}

#[test]
fn another_network_namespace_is_told_so() {
    let rig = Rig::new("elsewhere").unwrap();
    rig.attach().unwrap();
    for verb in [&["switch", NAME][..], &["flows", NAME], &["detach", NAME]] {
        let ended = rig.run_in(&rig.lab.client, verb).unwrap();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains("another network namespace"), "{ended:?}");
    }
    rig.finish().unwrap();
}

/// The fast path passes the firewall by, and a detach hands it connections that it has not seen begin.
#[test]
fn a_firewall_that_matters_is_told_of() {
    let rig = Rig::new("wall").unwrap();
    let arguments = rig.attach_arguments();
    let attach = || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let ended = rig.run(&arguments).unwrap();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        rig.ok(&["detach", NAME]).unwrap();
        ended.stderr
    };
    assert!(!attach().contains("warning"), "there is no firewall");
    let nft = |rule: &str| rig.lab.host.run(&[&["nft"][..], &rule.split(' ').collect::<Vec<_>>()].concat());
    nft("add table inet guard").unwrap();
    nft("add chain inet guard passing { type filter hook forward priority 0 ; policy drop ; }").unwrap();
    let said = attach();
    assert!(said.contains("warning: forwarding is dropped by inet guard passing"), "{said}");
    nft("add rule inet guard passing ct state invalid drop").unwrap();
    let said = attach();
    assert!(said.contains("invalid packets are dropped in inet guard passing"), "{said}");
    nft("delete table inet guard").unwrap();
    rig.finish().unwrap();
}

/// Of rules of iptables `nft` prints a part only, of its older tables and where it is missing nothing.
#[test]
fn what_is_not_known_of_a_firewall_is_told() {
    let rig = Rig::new("iptables").unwrap();
    rig.attach().unwrap();
    let host = &rig.lab.host;
    let switch = || {
        let ended = rig.run(&["switch", NAME]).unwrap();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.stderr
    };
    let iptables = |program: &str, rule: &str| {
        host.run(&[&[program, "-w"][..], &rule.split(' ').collect::<Vec<_>>()].concat()).unwrap()
    };
    assert!(!switch().contains("warning"), "there is no firewall");
    for (program, chain) in [("iptables-nft", "ip filter FORWARD"), ("ip6tables-nft", "ip6 filter FORWARD")] {
        iptables(program, "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        assert!(!switch().contains("warning"), "{program}: what is let by is no matter");
        iptables(program, "-A FORWARD -m conntrack --ctstate INVALID -j DROP");
        let said = switch();
        assert!(said.contains(&format!("drop in {chain} is not known")), "{program}: {said}");
        assert!(said.contains("next: iptables-save; ip6tables-save"), "{program}: {said}");
        host.run(&["nft", "flush", "ruleset"]).unwrap();
    }
    iptables("iptables-nft", "-A FORWARD -d 10.77.0.10 -j REJECT");
    assert!(switch().contains("warning: rules of ip filter FORWARD name the service"));
    iptables("iptables-nft", &format!("-R FORWARD 1 -i {UPLINK} -p tcp -j REJECT"));
    let said = switch();
    assert!(
        said.contains(&format!("rules of ip filter FORWARD drop what comes or goes by {UPLINK}")),
        "{said}"
    );
    host.run(&["nft", "flush", "ruleset"]).unwrap();
    let path = programs::find("nft").unwrap();
    let hidden = format!(
        "mount --bind /dev/null {} && exec {} switch {NAME}",
        path.canonicalize().unwrap().display(),
        programs::built("patchswitch").unwrap().display()
    );
    let ended = host.output(&["unshare", "--mount", "sh", "-c", &hidden]).unwrap();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("the rules of the firewall are not known: nft is not installed"),
        "{}",
        ended.stderr
    );
    // Kernels are built without the older tables by now.
    let older = host.output(&["iptables-legacy", "-w", "-A", "FORWARD", "-j", "ACCEPT"]).unwrap();
    if older.status.success() {
        let said = switch();
        assert!(said.contains("there are tables of iptables-legacy: filter"), "{said}");
        assert!(said.contains("next: iptables-legacy-save"), "{said}");
    } else {
        println!("not tested by this kernel: tables of iptables-legacy: {}", older.stderr);
    }
    rig.finish().unwrap();
}
