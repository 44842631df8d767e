//! Disks on real device-mapper: the cut, the discard, the commit, and everything that can break them.
//!
//! What is expected is looked at with `dmsetup`, `losetup`, `e2fsck`, `md5sum` and the mount table, not with
//! patchswitch's own eyes; and every test ends with those lists being as they were.

mod commit;
mod cut;
mod death;
mod engines;
mod faults;
mod full;
mod half;
mod lab;
mod marks;
mod meter;
mod pace;
mod power;
mod refusals;
mod udev;

pub(crate) use lab::scratch_disk;
