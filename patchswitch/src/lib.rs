//! patchswitch patches a running service without anybody noticing.
//!
//! ```text
//!  plan ─► clone ─► scan ─► inject ─► boot ─► patch ─► restart ─► verify ─► arm ─► TAKE OVER ─► observe ─► drain ─► retire ─► commit
//! ```
//!
//! The story is told in [`switchover`]; a program that wants it all calls [`switchover::apply`] with a
//! [`manager::Manager`]. A program that only wants to switch an address between two network namespaces needs
//! [`attachment::Attachment`] alone.
//!
//! Everything here is for root, on Linux 6.1 or later. Network operations are asynchronous and want a tokio runtime;
//! everything else blocks, within the time it is given.
//!
//! Arrows point down only:
//!
//! ```text
//!  switchover ─► manager ─► { partition, storage, attachment ─► dataplane, patch, verify, store } ─► host ─► kernel
//! ```

pub mod attachment;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod doctor;
pub mod exit;
pub mod host;
pub mod init;
pub mod manager;
pub mod names;
pub mod network;
pub mod partition;
pub mod patch;
pub mod storage;
pub mod store;
pub mod switchover;
pub mod verify;
