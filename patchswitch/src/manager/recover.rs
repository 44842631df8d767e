//! `up` and `down`: after a kill or a boot, at any moment, things are put right and it is said what was done.
//!
//! While the host is up, the phase word in the pinned map is the only truth about the switch, and the store follows it.
//! After a boot there is no word, and the durable record decides.

use patchswitch_common::word::Phase as WordPhase;
use serde::Serialize;
use serde_json::json;

use super::{Machine, Manager, ManagerError, Teardown, chain, service, slot_of};
use crate::attachment::{Attachment, DrainOptions, OnDeadline};
use crate::config::Service;
use crate::exit::ExitCode;
use crate::host::linux::cutter;
use crate::host::linux::dm::Done;
use crate::host::linux::mountns::MountNamespace;
use crate::names::{self, Name, RUN_ROOT};
use crate::partition::console::Console;
use crate::partition::lifecycle;
use crate::patch::table;
use crate::storage::{disk, snapshot};
use crate::store::{Change, Job, JobLock, LockError, StepState};

/// How long a program of a killed command may take to end.
const ORPHAN: std::time::Duration = std::time::Duration::from_secs(60);

/// What `up` did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Recovered {
    /// One line for each thing that was done; empty if everything was right.
    pub actions: Vec<String>,
    /// What could not be put right.
    pub failures: Vec<String>,
}

impl Recovered {
    fn fail(&mut self, job: &Job, error: &ManagerError) {
        self.failures.push(format!("job {} of {}: {}", job.id, job.service, chain(error)));
    }
}

/// How far a job was recovered at once.
enum Recovery {
    /// It is over.
    Ended,
    /// Its disks are being merged; the end is waited for when all services are there.
    Merging,
}

impl Manager {
    /// Puts everything right: half copied patches, jobs that nobody works on any more, devices that a broken cut left
    /// suspended, services that should be there, and at last merges that were interrupted. Right also if all is well.
    ///
    /// # Errors
    /// [`ManagerError::Store`]; what fails for one service is in [`Recovered::failures`].
    pub async fn up(&mut self) -> Result<Recovered, ManagerError> {
        let mut done = Recovered::default();
        match table::sweep(self.state()) {
            Ok(Change::AlreadySo) => {}
            Ok(Change::Changed) => done.actions.push("half copied patches were removed".to_owned()),
            Err(error) => done.failures.push(chain(&error)),
        }
        let merges = self.recover_jobs(&mut done).await?;
        self.serve_all(&merges, &mut done).await?;
        self.announce_again().await;
        // Merges take long, and no client waits for one.
        for (job, _lock) in merges {
            match self.finish_commit(&job) {
                Ok(what) => done.actions.push(what),
                Err(error) => done.fail(&job, &error),
            }
        }
        Ok(done)
    }

    /// Ends jobs that nobody works on any more, but for merges: these are begun and returned.
    async fn recover_jobs(&mut self, done: &mut Recovered) -> Result<Vec<(Job, JobLock)>, ManagerError> {
        let mut merges = Vec::new();
        for job in self.store.open_jobs()? {
            // Somebody is at it: leave it alone.
            let lock = match JobLock::acquire(std::path::Path::new(RUN_ROOT), &job.service) {
                Err(LockError::Busy { .. }) => continue,
                lock => lock?,
            };
            // It may have ended until the lock was free.
            if self.store.job(job.id)?.is_none_or(|job| job.ended_at.is_some()) {
                continue;
            }
            match self.recover(&job, &mut done.actions).await {
                Ok(Recovery::Ended) => {}
                Ok(Recovery::Merging) => merges.push((job, lock)),
                Err(error) => done.fail(&job, &error),
            }
        }
        Ok(merges)
    }

    async fn serve_all(
        &mut self,
        merges: &[(Job, JobLock)],
        done: &mut Recovered,
    ) -> Result<(), ManagerError> {
        let names: Vec<Name> = self.store.services()?.into_iter().map(|service| service.name).collect();
        for name in &names {
            let lock = if merges.iter().any(|(job, _)| &job.service == name) {
                None
            } else {
                // Somebody is at it: he knows better.
                let Ok(lock) = JobLock::acquire(std::path::Path::new(RUN_ROOT), name) else { continue };
                Some(lock)
            };
            // It may have been changed or removed until the lock was free.
            let Some(settings) = self.store.service(name)? else { continue };
            let was = self.is_served(&settings).unwrap_or(false);
            match self.serve(&settings).await {
                Ok(mended) => {
                    // One that is merged needs no room.
                    if lock.is_some() {
                        self.leave_stores(&settings);
                    }
                    if !was {
                        done.actions.push(format!("service {name} was started"));
                    }
                    done.actions.extend(mended.into_iter().map(|what| format!("service {name}: {what}")));
                }
                Err(error) => done.failures.push(format!("service {name}: {}", chain(&error))),
            }
        }
        Ok(())
    }

    /// Of a job that was killed nobody has left the stores in order.
    fn leave_stores(&self, settings: &Service) {
        match self.active(settings).and_then(|active| self.leave_unwatched(&active)) {
            Ok(left) => {
                for clone in left {
                    tracing::warn!("{}", self.can_fill_up_unwatched(&settings.name, &clone));
                }
            }
            Err(error) => {
                tracing::warn!(service = %settings.name, "stores of clones: {}", chain(&error));
            }
        }
    }

    fn is_served(&self, settings: &Service) -> Result<bool, ManagerError> {
        let machine = self.active(settings)?;
        Ok(self.is_running(&machine)? && Attachment::open(&settings.name).is_ok())
    }

    /// Ends a job that nobody works on any more; what was done is added to `done`.
    async fn recover(&mut self, job: &Job, done: &mut Vec<String>) -> Result<Recovery, ManagerError> {
        let settings = self.service(&job.service)?;
        // Whatever waits for a disk that stands still does not end.
        self.wake_disks(&settings, done)?;
        // A program that the killed command had started goes on without it, and makes what nobody takes away.
        self.runtime().settle(ORPHAN)?;
        // Whoever was to let it go on is gone.
        let frozen = self.active(&settings).and_then(|active| self.to_be_frozen(&active));
        match frozen {
            Ok(mounts) => cutter::thaw(&mounts),
            Err(error) => tracing::debug!("nothing is thawed: {}", chain(&error)),
        }
        let attachment = service::usable(&job.service)?;
        if self.was_committing(job)? {
            drop(attachment);
            // The disks are usable while they are merged: the service does not wait for that.
            crate::switchover::begin_merge(self, &job.service)?;
            return Ok(Recovery::Merging);
        }
        let what = match attachment {
            Some(attachment) => self.follow_word(job, &settings, attachment, done).await?,
            None => self.follow_record(job, &settings)?,
        };
        let message = format!("interrupted; {what}");
        let _ = self.store.end_job(job.id, ExitCode::Failed, &message)?;
        done.push(format!("job {} of service {}: {message}", job.id, job.service));
        Ok(Recovery::Ended)
    }

    /// Disks that a cut has left suspended go on, if the cutter and its guard were killed as well.
    fn wake_disks(&self, settings: &Service, done: &mut Vec<String>) -> Result<(), ManagerError> {
        let dm = Self::dm()?;
        for machine in [Some(self.active(settings)?), self.other(&settings.name)?].into_iter().flatten() {
            for disk in &machine.disks {
                let device = names::dm_disk(machine.name(), &disk.name);
                if disk::wake(&dm, &device)? == Done::Changed {
                    done.push(format!("service {}: disk {device} goes on", settings.name));
                }
            }
        }
        Ok(())
    }

    /// Whether the last thing that was begun is the merge: from there on there is only one way.
    fn was_committing(&self, job: &Job) -> Result<bool, ManagerError> {
        let steps = self.store.steps(job.id)?;
        let commit = steps.iter().find(|step| step.phase == "commit");
        Ok(commit.is_some_and(|step| matches!(step.state, StepState::Intended | StepState::Failed)))
    }

    /// Whether a job has a step of a phase in such a state.
    fn has(&self, job: &Job, phase: &str, is: impl Fn(StepState) -> bool) -> Result<bool, ManagerError> {
        Ok(self.store.steps(job.id)?.iter().any(|step| step.phase == phase && is(step.state)))
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

    /// The host was not booted since: the phase word says who serves, and everything else follows it.
    async fn follow_word(
        &mut self,
        job: &Job,
        settings: &Service,
        mut attachment: Attachment,
        done: &mut Vec<String>,
    ) -> Result<String, ManagerError> {
        crate::switchover::reunite(self, settings, &mut attachment).await?;
        // It was killed in a switch, perhaps between the store of the word and what belongs to it.
        // What cannot be mended of the side that goes must not keep the job; of the one that serves, `serve` tells.
        match attachment.reassert().await {
            Ok(mended) => {
                done.extend(mended.into_iter().map(|what| format!("service {}: {what}", settings.name)));
            }
            Err(error) => tracing::warn!(service = %settings.name, "{}", chain(&error)),
        }
        let Some(serving) = self.follow(settings, &attachment)? else {
            return Ok("nobody serves".to_owned());
        };
        let Some(other) = self.other(&settings.name)? else {
            return Ok(format!("{} serves", serving.name()));
        };
        self.follow_applied(job, &serving, &other)?;
        if !other.is_clone() {
            // A rollback that was killed may have started it again, only to be checked.
            let only_checked =
                job.kind == "rollback" && self.has(job, "boot", |state| state != StepState::Failed)?;
            let of = (!only_checked).then_some(settings);
            let retired = self.retire_drained(&mut attachment, &serving, &other, of).await?;
            let flows = if retired { "" } else { ", which still has flows," };
            return Ok(format!(
                "{} serves; {}{flows} can be committed away or rolled back to",
                serving.name(),
                other.name()
            ));
        }
        // A rollback that has begun to take the clone away has given back, whatever failed afterwards.
        let was_switched =
            job.kind == "rollback" || self.has(job, "take_over", |state| state == StepState::Done)?;
        if attachment.plane().word().phase() == WordPhase::Draining {
            // What its last flows write has room, as long as there is any.
            let _ = self.leave_unwatched(&other)?;
            // Given back: what the clone still answers may end, for as long as the service's own drain may take.
            let deadline = Some(settings.last_flows());
            attachment.drain(&DrainOptions { deadline, on_deadline: OnDeadline::Reset }, |_| {}).await?;
        }
        attachment.settle()?;
        if let Some(slot) = slot_of(&attachment, &other) {
            attachment.leave(slot).await?;
        }
        self.discard(&other)?;
        let untouched = if was_switched { "again" } else { "it was not touched" };
        Ok(format!("{} serves, {untouched}; the clone {} was discarded", serving.name(), other.name()))
    }

    /// The host was booted since: the durable record says who serves.
    fn follow_record(&mut self, job: &Job, settings: &Service) -> Result<String, ManagerError> {
        let serving = self.active(settings)?;
        let Some(other) = self.other(&settings.name)? else {
            return Ok(format!("{} serves", serving.name()));
        };
        self.follow_applied(job, &serving, &other)?;
        if !other.is_clone() {
            let (new, old) = (serving.name(), other.name());
            return Ok(format!("{new} serves; {old} can be committed away or rolled back to"));
        }
        self.discard(&other)?;
        Ok(format!("{} serves; the clone {} was discarded", serving.name(), other.name()))
    }

    /// The patches that the service runs with are those of whoever serves.
    fn follow_applied(&mut self, job: &Job, serving: &Machine, other: &Machine) -> Result<(), ManagerError> {
        let Some(patched) = self.store.last_apply(&job.service)? else { return Ok(()) };
        if serving.is_clone() {
            let _ = self.store.set_applied(patched)?;
        } else if other.is_clone() {
            let _ = self.store.unset_applied(patched)?;
        }
        Ok(())
    }

    /// Ends the switch and stops the old partition, if no flow is left there; whether that was so. If it is the old
    /// partition of this service's last switch, its last writes are counted as lost by that.
    ///
    /// # Errors
    /// [`ManagerError`]; calling again goes on.
    pub(crate) async fn retire_drained(
        &mut self,
        attachment: &mut Attachment,
        serving: &Machine,
        old: &Machine,
        of: Option<&Service>,
    ) -> Result<bool, ManagerError> {
        let now = DrainOptions { deadline: Some(std::time::Duration::ZERO), on_deadline: OnDeadline::Keep };
        let report = attachment.drain(&now, |_| {}).await?;
        if !report.settled {
            return Ok(false);
        }
        attachment.settle()?;
        if let Some(slot) = slot_of(attachment, old) {
            attachment.leave(slot).await?;
        }
        if let Some(service) = of {
            crate::switchover::recount(self, service, old)?;
        }
        self.stop(old)?;
        if let Err(error) = self.unmask(serving) {
            tracing::warn!(partition = %serving.name(), "failed to start what was masked: {}", chain(&error));
        }
        Ok(true)
    }

    /// Takes everything out of the kernel again; the store stays. Nothing there: nothing to do.
    ///
    /// # Errors
    /// [`ManagerError::Lock`] while a job runs, then nothing was changed; [`ManagerError::Cleanup`] with all that could
    /// not be removed.
    pub async fn down(&mut self) -> Result<Vec<Name>, ManagerError> {
        let services = self.store.services()?;
        let lock = |service: &Service| JobLock::acquire(std::path::Path::new(RUN_ROOT), &service.name);
        let locks = services.iter().map(lock).collect::<Result<Vec<_>, _>>()?;
        let mut teardown = Teardown::default();
        let mut stopped = Vec::new();
        for settings in services {
            teardown.note(service::detach(&settings.name).await);
        }
        for row in self.store.partitions()? {
            let machine = self.machine(&row.name)?;
            if lifecycle::state(&row.name)? != lifecycle::State::Stopped {
                stopped.push(row.name.clone());
            }
            teardown.note(self.stop(&machine));
            teardown.note(Console::of(&row.name).remove());
        }
        self.close_clones(&mut teardown)?;
        teardown.note(MountNamespace::remove(&Self::mount_namespace()));
        drop(locks);
        Self::remove_empty_directories();
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
