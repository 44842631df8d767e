//! What a writer of numbers was promised, and whether it was kept.

use std::time::Duration;

use anyhow::ensure;

/// The first number, and what is done with each that was acknowledged.
pub type Noting = (i64, Box<dyn FnMut(i64) + Send>);

/// What became of numbered rows.
#[derive(Debug, Default)]
pub struct Written {
    /// Those that the server said are there.
    pub acknowledged: Vec<i64>,
    /// Those without an answer, which may be there or not.
    pub unknown: Vec<i64>,
    /// Connections that could not be opened, and why.
    pub refused: Vec<String>,
    /// Connections that were opened.
    pub sessions: u32,
    /// The longest time from one row that is there to the next.
    pub longest: Duration,
}

impl Written {
    /// Proves that what the server said is true: what it promised is there, and nothing is that nobody wrote. The rows that
    /// are there come in their order.
    ///
    /// # Errors
    /// The first row that is wrong.
    pub fn check(&self, mut rows: Vec<i64>) -> anyhow::Result<()> {
        let before = rows.len();
        rows.retain(|row| self.unknown.binary_search(row).is_err());
        ensure!(
            rows == self.acknowledged,
            "{before} rows, {} unknown, {} acknowledged; the first that differs: {:?}",
            self.unknown.len(),
            self.acknowledged.len(),
            rows.iter().zip(&self.acknowledged).find(|(a, b)| a != b)
        );
        Ok(())
    }
}

impl std::fmt::Display for Written {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} rows, {} unknown, {} sessions, {:?} at most between two rows",
            self.acknowledged.len(),
            self.unknown.len(),
            self.sessions,
            self.longest
        )
    }
}
