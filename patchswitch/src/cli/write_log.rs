//! `write-log`: what a log of writes has recorded, for whoever wants to see what a disk was written.

use std::io::Write as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use patchswitch::exit::ExitCode;
use patchswitch::storage::disk::Backing;
use patchswitch::storage::write_log::format::What;
use patchswitch::storage::write_log::{Reader, Record};
use serde_json::json;

use super::print;

/// Arguments of `write-log`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each line is a record: its number, what was done, where and how much of it in bytes, and when it was on disk, in seconds since
the boot. What is written is flushed ten times a second, and a mark with the time is recorded then: what lies between two
marks was written between them, or in the tenth of a second before. Of a log that is being written the last records may not
be there yet. `--json` has the same for programs, with times in nanoseconds; `--data 12 | xxd` shows what record 12 wrote.")]
pub(crate) struct WriteLog {
    /// The device, or the image, to which dm-log-writes has written.
    log: PathBuf,
    /// Show only writes and discards, and only those that touch this byte of the disk.
    #[arg(long, value_name = "BYTE")]
    at: Option<u64>,
    /// Write what this record has written to the standard output, as it is, and nothing else.
    #[arg(long, value_name = "NUMBER", conflicts_with = "at")]
    data: Option<u64>,
}

impl WriteLog {
    pub(crate) fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        let kind = std::fs::symlink_metadata(&self.log);
        let kind = kind.with_context(|| format!("failed to look at {}", self.log.display()))?.file_type();
        let log = match kind.is_file() {
            true => Backing::Image(self.log.clone()),
            false if kind.is_block_device() || kind.is_symlink() => Backing::Device(self.log.clone()),
            false => anyhow::bail!("{} is neither an image nor a block device", self.log.display()),
        };
        let records = Reader::all(&log);
        let data = match (&records, self.data) {
            (Ok(records), Some(number)) => Some(data(&log, records, number)),
            _ => None,
        };
        // Only what was attached for this goes: whoever uses it has it open.
        log.detach()?;
        let mut records = records?;
        if let Some(data) = data {
            data?;
            return Ok(ExitCode::Done);
        }
        records.retain(|record| self.at.is_none_or(|byte| touches(&record.what, byte)));
        if json {
            print::json(&json!({"schema": "patchswitch.write-log/1", "records": records}))?;
        } else {
            records.iter().for_each(|record| print::text(&line(record)));
        }
        Ok(ExitCode::Done)
    }
}

fn data(log: &Backing, records: &[Record], number: u64) -> anyhow::Result<()> {
    let record = records.iter().find(|record| record.number == number);
    let record = record.with_context(|| format!("{log} has no record {number}; it has {}", records.len()))?;
    anyhow::ensure!(matches!(record.what, What::Write { .. }), "record {number} is no write: it has no data");
    let mut out = print::bytes();
    Reader::data(log, record, &mut out)?;
    Ok(out.flush()?)
}

fn touches(what: &What, byte: u64) -> bool {
    match what {
        What::Write { at, bytes, .. } | What::Discard { at, bytes } => {
            (*at..at.saturating_add(*bytes)).contains(&byte)
        }
        What::Flush | What::Mark { .. } => false,
    }
}

fn line(record: &Record) -> String {
    let time = |ns: Option<u64>| match ns.map(std::time::Duration::from_nanos) {
        Some(time) => format!("{:.3}", time.as_secs_f64()),
        None => "?".to_owned(),
    };
    let what = match &record.what {
        What::Write { at, bytes, .. } => format!("write    {at:>14} {bytes:>10}"),
        What::Discard { at, bytes } => format!("discard  {at:>14} {bytes:>10}"),
        What::Flush => "flush".to_owned(),
        What::Mark { text } => format!("mark     {text}"),
    };
    format!("{:>8}  {:>12} to {:<12}  {what}", record.number, time(record.after_ns), time(record.before_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_a_line_with_its_place_and_its_time() {
        let write = What::Write { at: 4096, bytes: 512, at_once: false };
        assert!(
            touches(&write, 4096)
                && touches(&write, 4607)
                && !touches(&write, 4608)
                && !touches(&What::Flush, 0)
        );
        let record =
            Record { number: 3, what: write, data: 0, after_ns: Some(1_500_000_000), before_ns: None };
        let words: Vec<_> = line(&record).split_whitespace().map(str::to_owned).collect();
        assert_eq!(words, ["3", "1.500", "to", "?", "write", "4096", "512"]);
    }
}
