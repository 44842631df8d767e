//! The phase word in this process's memory.
#![expect(unsafe_code, reason = "maps the word's page into memory: the switch is one store into it")]

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::MapData;
use patchswitch_common::word::Word;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::DataplaneError;
use super::maps::failed;

const PAGE: usize = 4096;

/// The page of the pinned array that holds the word.
#[derive(Debug)]
pub(super) struct MappedWord {
    page: *mut AtomicU64,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the struct, and is used only as an atomic.
unsafe impl Send for MappedWord {}
// SAFETY: as above.
unsafe impl Sync for MappedWord {}

impl MappedWord {
    pub(super) fn open(pin: &Path) -> Result<Self, DataplaneError> {
        let map = MapData::from_pin(pin).map_err(failed("open", super::maps::WORD))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let fd: File = map
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map(File::from)
            .map_err(|source| DataplaneError::File { action: "open", path: pin.to_owned(), source })?;
        // SAFETY: a new mapping at an address of the kernel's choice. The map is a BPF_F_MMAPABLE array, whose memory
        // begins with its first value and has at least one page.
        let page = unsafe { mmap(std::ptr::null_mut(), PAGE, protection, MapFlags::SHARED, &fd, 0) };
        let page = page.map_err(|errno| DataplaneError::File {
            action: "map",
            path: pin.to_owned(),
            source: errno.into(),
        })?;
        Ok(Self { page: page.cast() })
    }

    fn cell(&self) -> &AtomicU64 {
        // SAFETY: the mapping lives as long as `self`, is aligned to a page, and is only ever accessed atomically: here,
        // and by the BPF programs with one aligned 8-byte load.
        unsafe { &*self.page }
    }

    pub(super) fn load(&self) -> Word {
        Word(self.cell().load(Ordering::Acquire))
    }

    pub(super) fn exchange(&self, old: Word, new: Word) -> bool {
        self.cell().compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

impl Drop for MappedWord {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `open` with this size, and nothing refers to it any more. A failure leaves
        // the page mapped, which harms nobody.
        let _ = unsafe { munmap(self.page.cast(), PAGE) };
    }
}
