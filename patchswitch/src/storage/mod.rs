//! The disks of partitions: clone them in one instant, discard the clone or make it the disk, count what is lost.
//!
//! Device-mapper owns every disk from the start (a plain disk that is mounted cannot be interposed), so what changes
//! in the life of a disk is only its table, while it is mounted and serving:
//!
//! ```text
//!               clone_disks                         discard
//!  a: linear ───────────────► a: snapshot-origin ─────────────► a: linear           (the clone is gone)
//!                             b: snapshot
//!                                      │ commit: remove a
//!                                      ▼
//!                             b: snapshot-merge ──────────────► b: linear           (b is the disk, its store is free)
//! ```
//!
//! | module | what it has |
//! |---|---|
//! | [`disk`] | a disk and what is behind it: images, activation, what is refused |
//! | [`cow`] | the store of a clone: its size, its header, how full it is |
//! | [`extend`] | a store that becomes larger while it is in use |
//! | [`pace`] | how fast a disk is written |
//! | [`table`] | tables and status lines, typed and pure |
//! | [`snapshot`] | the cut, its undo, the discard |
//! | [`merge`] | the commit, and going on with it after a crash |
//! | [`copies`] | copies of several disks, each by its engine, cut in one instant with clones of others |
//! | [`copy`] | a copy on another device, which may be written over until somebody has used it |
//! | [`write_log`] | the engine that records writes and replays them |
//! | [`mirror`] | the engine that mirrors and splits |
//! | [`meter`] | what a switch or a rollback loses, in sectors and in files |
//!
//! Where the copy has to be on another device, and not only be another one:
//!
//! ```text
//!               begin                                  cut, split
//!  a: linear ───────────► a: log-writes or mirror ───────────────► a: linear    on what it was on
//!                         │ while it serves                        b: linear    on the other device
//! ```
//!
//! Everything here is synchronous, and idempotent where a crash may have come in between. Who calls: the switchover,
//! `up` and `down`.

pub mod copies;
pub mod copy;
pub mod cow;
mod cut;
pub mod disk;
mod error;
pub mod extend;
pub mod merge;
pub mod meter;
pub mod mirror;
pub mod pace;
pub mod snapshot;
pub mod table;
mod ticker;
pub mod write_log;

pub use error::{Failed, StorageError, Unfinished};
