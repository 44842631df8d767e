//! Linux, one named place for each part of it.

pub mod programs;
pub mod root;
