//! `up` and `down`: after a kill or a boot, at any moment, things are put right and it is said what was done.
//!
//! While the host is up, the phase word in the pinned map is the only truth about the switch, and the store follows it.
//! After a boot there is no word, and the durable record decides.

use patchswitch_common::word::Phase;
use serde::Serialize;
use serde_json::json;

use super::{Machine, Manager, ManagerError, Teardown, chain, service, slot_of};
use crate::attachment::{AttachError, Attachment, RecordError};
use crate::config::Service;
use crate::exit::ExitCode;
use crate::names::{Name, RUN_ROOT};
use crate::storage::snapshot;
use crate::store::{Job, JobLock, Role, StepState};

/// What `up` did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Recovered {
    /// One line for each thing that was done; empty if everything was right.
    pub actions: Vec<String>,
    /// What could not be put right.
    pub failures: Vec<String>,
}

impl Manager {
    /// Puts everything right: jobs that nobody works on any more, devices that a broken cut left suspended, merges
    /// that were interrupted, services that should be there. Right also if all is well.
    ///
    /// # Errors
    /// [`ManagerError::Store`]; what fails for one service is in [`Recovered::failures`].
    pub async fn up(&mut self) -> Result<Recovered, ManagerError> {
        let mut done = Recovered::default();
        for job in self.store.open_jobs()? {
            // Somebody is at it: leave it alone.
            let Ok(_lock) = JobLock::acquire(std::path::Path::new(RUN_ROOT), &job.service) else { continue };
            match self.recover(&job).await {
                Ok(what) => done.actions.push(what),
                Err(error) => done.failures.push(format!("job {} of {}: {}", job.id, job.service, chain(&error))),
            }
        }
        for settings in self.store.services()? {
            let was = self.is_served(&settings).unwrap_or(false);
            match self.serve(&settings).await {
                Ok(()) if was => {}
                Ok(()) => done.actions.push(format!("service {} was started", settings.name)),
                Err(error) => done.failures.push(format!("service {}: {}", settings.name, chain(&error))),
            }
        }
        Ok(done)
    }

    fn is_served(&self, settings: &Service) -> Result<bool, ManagerError> {
        let machine = self.active(settings)?;
        Ok(self.is_running(&machine)? && Attachment::open(&settings.name).is_ok())
    }

    /// Ends a job that nobody works on any more.
    async fn recover(&mut self, job: &Job) -> Result<String, ManagerError> {
        let settings = self.service(&job.service)?;
        let attachment = match Attachment::open(&job.service) {
            Ok(attachment) => Some(attachment),
            Err(AttachError::Record(RecordError::Unknown(_))) => None,
            Err(error) => return Err(error.into()),
        };
        if self.was_committing(job)? {
            drop(attachment);
            return self.finish_commit(job);
        }
        let what = match attachment {
            Some(attachment) => self.follow_word(&settings, attachment).await?,
            None => self.follow_record(&settings)?,
        };
        let message = format!("interrupted; {what}");
        let _ = self.store.end_job(job.id, ExitCode::Failed, &message)?;
        Ok(format!("job {} of service {}: {message}", job.id, job.service))
    }

    /// Whether the last thing that was begun is the merge: from there on there is only one way.
    fn was_committing(&self, job: &Job) -> Result<bool, ManagerError> {
        let steps = self.store.steps(job.id)?;
        let commit = steps.iter().find(|step| step.phase == "commit");
        Ok(commit.is_some_and(|step| matches!(step.state, StepState::Intended | StepState::Failed)))
    }

    fn finish_commit(&mut self, job: &Job) -> Result<String, ManagerError> {
        let bytes = crate::switchover::merge_disks(self, &job.service)?;
        let commit = self.store.steps(job.id)?.into_iter().find(|step| step.phase == "commit");
        if let Some(step) = commit.filter(|step| step.state == StepState::Intended) {
            let _ = self.store.conclude(step.id, StepState::Done, &json!({"cow_bytes": bytes}))?;
        }
        let message = "interrupted while committing; the commit was finished";
        let _ = self.store.end_job(job.id, ExitCode::Done, message)?;
        Ok(format!("job {} of service {}: {message}", job.id, job.service))
    }

    /// The host was not booted since: the phase word says who serves.
    async fn follow_word(&mut self, settings: &Service, mut attachment: Attachment) -> Result<String, ManagerError> {
        let word = attachment.plane().word();
        let serving = self.machine_in(&attachment, word.active())?;
        let Some(serving) = serving else { return Ok("nobody serves".to_owned()) };
        if self.store.primary(&settings.name)?.is_none_or(|primary| primary.partition != *serving.name()) {
            let generation = self.next_generation(&settings.name)?;
            let _ = self.store.record_switch(&settings.name, serving.name(), generation)?;
        }
        self.resume_devices(&serving)?;
        let Some(other) = self.other(&settings.name)? else {
            return Ok(format!("{} serves", serving.name()));
        };
        let is_clone = !other.clones().is_empty();
        if !is_clone {
            // Switched: the old partition has its flows, or has ended already. Which one stays, a person decides.
            return Ok(format!("{} serves; {} can be committed away or rolled back to", serving.name(), other.name()));
        }
        if word.phase() == Phase::Draining {
            // Given back: what the clone still answers is cut with it.
            attachment.settle()?;
        }
        if word.learns() || word.notice() {
            attachment.settle()?;
        }
        if let Some(slot) = slot_of(&attachment, &other) {
            attachment.leave(slot).await?;
        }
        self.discard(&other)?;
        Ok(format!("{} serves, it was not touched; the clone {} was discarded", serving.name(), other.name()))
    }

    /// The host was booted since: the durable record says who serves.
    fn follow_record(&mut self, settings: &Service) -> Result<String, ManagerError> {
        let serving = self.active(settings)?;
        match self.other(&settings.name)? {
            Some(other) if !other.clones().is_empty() => {
                self.discard(&other)?;
                Ok(format!("{} serves; the clone {} was discarded", serving.name(), other.name()))
            }
            Some(other) => Ok(format!("{} serves; {} is its old partition", serving.name(), other.name())),
            None => Ok(format!("{} serves", serving.name())),
        }
    }

    /// A cut that was killed on both of its ends may have left a device suspended.
    fn resume_devices(&self, machine: &Machine) -> Result<(), ManagerError> {
        if self.is_running(machine)? {
            let _ = self.open_disks(machine)?;
        }
        Ok(())
    }

    fn machine_in(
        &self,
        attachment: &Attachment,
        slot: patchswitch_common::Slot,
    ) -> Result<Option<Machine>, ManagerError> {
        let Some(entry) = &attachment.record().slots[slot as usize] else { return Ok(None) };
        let netns = entry.netns.to_string();
        let row = self.store.partitions()?.into_iter().find(|row| crate::names::netns(&row.name) == netns);
        row.map(|row| self.machine(&row.name)).transpose()
    }

    /// Takes everything out of the kernel again; the store stays. Nothing there: nothing to do.
    ///
    /// # Errors
    /// [`ManagerError::Cleanup`] with all that could not be removed.
    pub async fn down(&mut self) -> Result<Vec<Name>, ManagerError> {
        let mut teardown = Teardown::default();
        let mut stopped = Vec::new();
        for settings in self.store.services()? {
            teardown.note(service::detach(&settings.name).await);
        }
        for row in self.store.partitions()? {
            let machine = self.machine(&row.name)?;
            if row.role == Role::Standby && row.service.is_none() && !self.is_running(&machine)? {
                continue;
            }
            teardown.note(self.stop(&machine));
            stopped.push(row.name);
        }
        self.close_clones(&mut teardown)?;
        teardown.note(crate::host::linux::mountns::MountNamespace::remove(
            &std::path::Path::new(RUN_ROOT).join("mnt"),
        ));
        teardown.finish()?;
        Ok(stopped)
    }

    /// Clones go last: their origins lie under other partitions' disks.
    fn close_clones(&mut self, teardown: &mut Teardown) -> Result<(), ManagerError> {
        for row in self.store.partitions()? {
            let clones = self.machine(&row.name)?.clones();
            if !clones.is_empty() {
                let dm = Self::dm()?;
                teardown.note(snapshot::close(&dm, &clones, super::machine::CLOSE));
            }
        }
        Ok(())
    }
}
