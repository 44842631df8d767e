//! Patches: what they are, and how they reach a partition.
//!
//! ```text
//!   patch add ─► table: digest, copy ─► approve ─► inject: into a clone that has never run ─► applied at its boot
//!                                                     ▲                                              │
//!                                       scan of the clone (702)               results ─► store, checked by the table
//! ```

mod deb;
mod digest;
pub mod inject;
pub mod name;
pub mod scan;
pub mod table;
pub mod wire;
