//! Logical computers: partitions of the host.
//!
//! ```text
//!                 define                    start                     init runs
//!   (nothing) ───────────► disks with a ───────────► created ───────────────────► running
//!                          root, no process               │ a step fails             │ stop, or the init ends
//!                                ▲                        ▼                          ▼
//!                                └──────────────── cleaned up: no process, no cgroup, no run-time file
//! ```
//!
//! * [`spec`]: what a logical computer is to be. [`resources`]: how much it has, and which one covers another.
//! * [`define`]: a disk gets its root. [`program`]: our init, found and checked.
//! * [`bundle`]: the policy, as the OCI runtime reads it.
//! * [`lifecycle`]: start, stop, exec, state. [`console`]: what it wrote. [`control`]: what it says.
//!
//! The disks, their mounts and the network namespace are the caller's: here a root is a path, and a network a
//! descriptor. What runs lives in the kernel and not in this process: an agent that ends takes nothing with it, and
//! the next one finds everything again.

pub mod bundle;
pub mod console;
pub mod control;
pub mod define;
pub mod lifecycle;
pub mod program;
pub mod resources;
mod seccomp;
pub mod spec;
