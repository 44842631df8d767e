//! Settings of the host that attachments need, each with the value it had before and the attachments that need it.
//!
//! Several attachments share an uplink, so a setting is put back when the last one that needs it goes. What was right
//! already is not ours and is not put back. Every entry is written down before the kernel is asked.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::record::{RecordError, io, remove_json, write_json};
use super::{AttachError, Lock};
use crate::host::linux::netlink::Netlink;
use crate::host::linux::sysctl;
use crate::names::{Name, RUN_ROOT};

/// What was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum What {
    /// A kernel setting below `net.`.
    Sysctl {
        key: String,
        old: String,
        /// Written back only while it has this value: another one is somebody else's decision.
        new: String,
    },
    /// A `clsact` qdisc on this link.
    Clsact { link: String },
}

/// One change and its users.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// Device and inode of the host's network namespace.
    host: (u64, u64),
    what: What,
    users: Vec<Name>,
}

/// All changes on this machine, in the order in which they were made.
#[derive(Debug)]
pub(super) struct Settings<'a> {
    entries: Vec<Entry>,
    host: (u64, u64),
    _lock: &'a Lock,
}

/// A setting as it is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) key: String,
    pub(super) value: &'static str,
    /// It is right now, but putting back a later one will set it to `value`, after which it is to be as it is now.
    pub(super) only_to_keep: bool,
}

fn file() -> PathBuf {
    Path::new(RUN_ROOT).join("settings.json")
}

impl<'a> Settings<'a> {
    /// Reads what was changed in a network namespace.
    pub(super) fn load(host: (u64, u64), lock: &'a Lock) -> Result<Self, RecordError> {
        let entries = match fs::read(file()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(io("read", &file())(error)),
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|source| RecordError::Parse { path: file(), source })?
            }
        };
        Ok(Self { entries, host, _lock: lock })
    }

    fn save(&self) -> Result<(), RecordError> {
        if !self.entries.is_empty() {
            return write_json(&file(), &self.entries);
        }
        remove_json(&file())
    }

    /// Joins the users of a change that was made already.
    fn join(&mut self, user: &Name, is: impl Fn(&What) -> bool) -> Result<bool, RecordError> {
        let host = self.host;
        let Some(entry) = self.entries.iter_mut().find(|e| e.host == host && is(&e.what)) else {
            return Ok(false);
        };
        if !entry.users.contains(user) {
            entry.users.push(user.clone());
        }
        self.save().map(|()| true)
    }

    fn add(&mut self, user: &Name, what: What) -> Result<(), RecordError> {
        self.entries.push(Entry { host: self.host, what, users: vec![user.clone()] });
        self.save()
    }

    /// Makes a setting as wanted.
    pub(super) fn set(&mut self, user: &Name, wanted: &Wanted) -> Result<(), AttachError> {
        let old = sysctl::read(&wanted.key)?;
        let is = |what: &What| matches!(what, What::Sysctl { key, .. } if *key == wanted.key);
        let known = self.join(user, is)?;
        if !known && (wanted.only_to_keep || old != wanted.value) {
            let (key, new) = (wanted.key.clone(), wanted.value.to_owned());
            self.add(user, What::Sysctl { key, old: old.clone(), new })?;
        }
        if !wanted.only_to_keep && old != wanted.value {
            sysctl::write(&wanted.key, wanted.value)?;
        }
        Ok(())
    }

    /// Makes sure that a link has a `clsact` qdisc.
    pub(super) async fn clsact(
        &mut self,
        user: &Name,
        host: &Netlink,
        link: &str,
    ) -> Result<(), AttachError> {
        let found = host.link(link).await?;
        let is = |what: &What| matches!(what, What::Clsact { link: other } if other == link);
        if !self.join(user, is)? {
            if host.has_clsact(&found).await? {
                return Ok(());
            }
            self.add(user, What::Clsact { link: link.to_owned() })?;
        }
        Ok(host.add_clsact(&found).await?)
    }

    /// Puts back what nobody but this user needs, the last change first.
    pub(super) async fn release(&mut self, user: &Name, host: &Netlink) -> Vec<AttachError> {
        let mut errors = Vec::new();
        let mut at = self.entries.len();
        while let Some(entry) = at.checked_sub(1).and_then(|last| self.entries.get_mut(last)) {
            at -= 1;
            if entry.host != self.host || !entry.users.contains(user) {
                continue;
            }
            if entry.users.len() > 1 {
                entry.users.retain(|name| name != user);
            } else if let Err(error) = put_back(&entry.what, host).await {
                errors.push(error);
                continue;
            } else {
                self.entries.remove(at);
            }
            errors.extend(self.save().err().map(AttachError::Record));
        }
        errors
    }
}

async fn put_back(what: &What, host: &Netlink) -> Result<(), AttachError> {
    match what {
        What::Sysctl { key, old, new } => match sysctl::read(key) {
            Ok(now) if now == *new && now != *old => Ok(sysctl::write(key, old)?),
            // Somebody decided otherwise meanwhile, or the link of the setting is gone.
            _ => Ok(()),
        },
        What::Clsact { link } => match host.link(link).await {
            Ok(link) => Ok(host.remove_clsact(&link).await?),
            Err(crate::host::linux::netlink::NetlinkError::NoLink(_)) => Ok(()),
            Err(error) => Err(error.into()),
        },
    }
}
