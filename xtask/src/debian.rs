//! Debian's archive, by apt with lists of its own: works for any user, on any release, and leaves the machine's own
//! lists alone. Proxies of the machine's apt configuration are used.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, say};
use crate::command::Tool;

/// The release of the guest and of the demo's partition.
pub(crate) const SUITE: &str = "bookworm";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The line of apt's sources for the main archive.
pub(crate) fn main_archive() -> String {
    let mirror = mirror("PATCHSWITCH_MIRROR", "http://deb.debian.org/debian");
    format!("deb [signed-by={KEYRING}] {mirror} {SUITE} main")
}

/// The line of apt's sources for the security archive.
pub(crate) fn security_archive() -> String {
    let mirror = mirror("PATCHSWITCH_SECURITY_MIRROR", "http://deb.debian.org/debian-security");
    format!("deb [signed-by={KEYRING}] {mirror} {SUITE}-security main")
}

fn mirror(variable: &str, default: &str) -> String {
    std::env::var(variable).ok().filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned())
}

/// Both archives, as this cache last saw them.
pub(crate) struct Archive {
    dir: PathBuf,
}

impl Archive {
    pub(crate) fn open(cache: &Cache) -> Result<Self> {
        let dir = cache.work_dir("apt")?;
        for sub in ["lists/partial", "cache/archives/partial", "etc"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        fs::write(dir.join("status"), "")?;
        let sources = format!("{}\n{}\n", main_archive(), security_archive());
        let file = dir.join("etc/sources.list");
        let known = fs::read_to_string(&file).is_ok_and(|text| text == sources);
        fs::write(&file, sources)?;
        let archive = Self { dir };
        if !known || !archive.has_lists()? {
            archive.update()?;
        }
        Ok(archive)
    }

    /// Fetches the lists of packages anew.
    pub(crate) fn update(&self) -> Result<()> {
        say("fetching Debian's package lists …");
        self.apt("apt-get").args(["-qq", "update"]).quiet()
    }

    /// The version of a package that apt would install.
    pub(crate) fn candidate(&self, package: &str) -> Result<String> {
        let text = self.apt("apt-cache").args(["policy", package]).read()?;
        let found = text.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        match found {
            Some(version) if version != "(none)" => Ok(version.to_owned()),
            _ => bail!("Debian's archive has no package {package}"),
        }
    }

    /// The packages that a package names first in its `Depends`, without versions.
    pub(crate) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let text = self.apt("apt-cache").args(["show", "--no-all-versions", package]).read()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        Ok(line.split(',').filter_map(|item| item.split_whitespace().next()).map(str::to_owned).collect())
    }

    /// Downloads packages into a directory; apt checks their digests. Lists that are too old name packages that the
    /// archive has removed, hence the second try.
    pub(crate) fn download(&self, packages: &[String], into: &Path) -> Result<()> {
        let get = || self.apt("apt-get").args(["-qq", "download"]).args(packages).dir(into).quiet();
        get().or_else(|first| {
            self.update()?;
            get().with_context(|| format!("first try: {first:#}"))
        })
    }

    fn has_lists(&self) -> Result<bool> {
        let names = fs::read_dir(self.dir.join("lists"))?.map(|entry| entry.map(|e| e.file_name()));
        let names = names.collect::<std::io::Result<Vec<_>>>()?;
        let of = |suite: &str| {
            names.iter().any(|name| {
                let name = name.to_string_lossy();
                name.contains(&format!("_dists_{suite}_")) && name.contains("Packages")
            })
        };
        Ok(of(SUITE) && of(&format!("{SUITE}-security")))
    }

    fn apt(&self, program: &str) -> Tool {
        let dir = self.dir.display();
        let options = [
            format!("Dir::State={dir}"),
            format!("Dir::State::status={dir}/status"),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache={dir}/cache"),
            format!("Dir::Etc::sourcelist={dir}/etc/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            // The sandbox user could not write into a home directory.
            format!("APT::Sandbox::User={}", if rustix::process::getuid().is_root() { "root" } else { "" }),
        ];
        let mut tool = Tool::new(program).env("DEBIAN_FRONTEND", "noninteractive");
        for option in options {
            tool = tool.arg("-o").arg(option);
        }
        tool
    }
}
