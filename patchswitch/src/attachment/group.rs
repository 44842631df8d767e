//! Several attachments that switch as one: all of a group read one phase word, so one store moves the new flows of all of
//! them at the same moment.
//!
//! ```text
//!  web  (old1, new1) ─┐
//!                     ├─ WORD ◄── one store
//!  mail (old2, new2) ─┘
//! ```
//!
//! The first of a group gives it its name. Each member has links, addresses and programs of its own; what belongs to a
//! switch beside the store is done for each of them, before it and after it.

use patchswitch_common::word::Phase;

use super::{AttachError, Attachment, Lock, Record, RecordError, Spec, here};
use crate::dataplane::Dataplane;
use crate::host::linux::netlink::Netlink;
use crate::names::Name;

impl Record {
    /// The name of its group: its own, if nobody else has given it one.
    pub fn group(&self) -> &Name {
        self.group.as_ref().unwrap_or(&self.name)
    }

    /// The records of all others of its group.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn others(&self) -> Result<Vec<Self>, RecordError> {
        let mut all = Self::all()?;
        all.retain(|other| {
            other.name != self.name && other.host == self.host && other.group() == self.group()
        });
        Ok(all)
    }
}

impl Attachment {
    /// Opens the others of a group, whose word is this one's.
    pub(super) fn open_others(record: &Record) -> Result<Vec<Self>, AttachError> {
        let mut others = Vec::new();
        for other in record.others()? {
            let lock = Lock::of(&other.name)?;
            if !other.ready {
                return Err(AttachError::Incomplete(other.name));
            }
            let (plane, host) = (Dataplane::open(&other.name)?, Netlink::open(&here(&other)?)?);
            others.push(Self { record: other, plane, host, others: Vec::new(), _lock: lock });
        }
        Ok(others)
    }

    /// The names of all that switch with it, its own first.
    pub fn members(&self) -> Vec<Name> {
        std::iter::once(self).chain(&self.others).map(|member| member.record.name.clone()).collect()
    }
}

/// The record of who is to be in a group with a new attachment, and its name. Whoever joins has the same roles: while
/// somebody retires or shares, it could not be said what the new one's are.
pub(super) fn leader(spec: &Spec) -> Result<Option<Name>, AttachError> {
    let Some(with) = &spec.with else {
        return match Record::all()?.into_iter().find(|record| record.group.as_ref() == Some(&spec.name)) {
            Some(member) => Err(AttachError::Refused(format!(
                "{} is still the name of a group, to which {} belongs; choose another one, or join it: --with {1}",
                spec.name, member.name
            ))),
            None => Ok(None),
        };
    };
    let record = Record::load(with)?;
    if record.of_service {
        return Err(AttachError::Refused(format!("{with} belongs to a service, which switches by itself")));
    }
    here(&record)?;
    let group = record.group().clone();
    let word = Dataplane::open(with)?.word();
    if word.phase() != Phase::Steady || word.learns() {
        return Err(AttachError::Refused(format!(
            "a switch of {group} is under way; whoever joins it has to wait: patchswitch drain {with}"
        )));
    }
    Ok(Some(group))
}
