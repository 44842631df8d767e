//! The keeper of a partition's console log, on the host.
//!
//! The partition writes into a pipe whose other end this program has. So nobody inside holds a file of the host's, a
//! chatty partition fills nothing, and the log goes on whether an agent runs or not. The end of the pipe, when the
//! last process of the partition has gone, is the end of this program.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::args::ConsoleOptions;
use super::say;
use super::supervisor::itself;

/// How long each of the two files grows, in bytes: between one and two times this are kept.
pub const LOG_MAX: u64 = 256 << 10;

/// The file that has what came before the current one.
pub fn older(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Keeps the log until the end of standard input, or starts a copy of itself that does.
pub(super) fn main(options: &ConsoleOptions) -> u8 {
    let result = if options.detach { detach(options) } else { keep(options) };
    result.map_or_else(
        |error| {
            say(&format!("failed to keep the console log {}: {error}", options.file.display()));
            74
        },
        |()| 0,
    )
}

/// The copy is nobody's child, so nobody has to wait for it.
fn detach(options: &ConsoleOptions) -> io::Result<()> {
    let mut command = itself()?;
    command.arg("console").arg("--file").arg(&options.file);
    command
        .stdin(std::process::Stdio::inherit())
        .stdout(File::open("/dev/null")?)
        .stderr(File::open("/dev/null")?);
    command.spawn().map(drop)
}

fn keep(options: &ConsoleOptions) -> io::Result<()> {
    // Out of reach of the terminal from which the agent was started. That it is a leader already is as good.
    let _ = rustix::process::setsid();
    let mut log = Rotating::open(&options.file, LOG_MAX)?;
    let mut piece = [0; 16 << 10];
    loop {
        match io::stdin().read(&mut piece) {
            Ok(0) => return Ok(()),
            // Where the host's disk is full the log has a hole; the partition is not held up.
            Ok(count) => drop(log.write(&piece[..count])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A file that, when it is full, becomes the older one and begins anew.
struct Rotating {
    path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

impl Rotating {
    fn open(path: &Path, limit: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, length, limit })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.length + bytes.len() as u64 > self.limit {
            fs::rename(&self.path, older(&self.path))?;
            *self = Self::open(&self.path, self.limit)?;
        }
        self.length += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_survives_and_the_size_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Rotating::open(&path, 1000).unwrap();
        let mut written = String::new();
        for number in 0..1000 {
            let line = format!("line {number}\n");
            log.write(line.as_bytes()).unwrap();
            written.push_str(&line);
        }
        let kept = fs::read_to_string(older(&path)).unwrap() + &fs::read_to_string(&path).unwrap();
        assert!(written.ends_with(&kept) && (1000..=2000).contains(&kept.len()), "{}", kept.len());
        // Another boot goes on where this one ended.
        let mut log = Rotating::open(&path, 1000).unwrap();
        log.write(b"second boot\n").unwrap();
        let kept = fs::read_to_string(older(&path)).unwrap() + &fs::read_to_string(&path).unwrap();
        assert!(kept.ends_with("line 999\nsecond boot\n") && kept.len() <= 2000);
    }
}
