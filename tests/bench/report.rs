//! What was measured: the table on the screen, `net.json`, `raw.json`.
#![expect(clippy::print_stdout, reason = "the measurements are for the terminal")]

use serde::Serialize;
use serde_json::{Value, json};

use crate::stats::{Block, Interval};

/// Says how far the measurements are.
pub(crate) fn say(text: &str) {
    println!("{text}");
}

/// What a figure must reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(limit) => value >= limit,
            Self::AtMost(limit) => value <= limit,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(limit) => format!("≥ {}", number(limit)),
            Self::AtMost(limit) => format!("≤ {}", number(limit)),
        }
    }
}

/// A row of `net.json`. Where the unit does not begin with `ratio`, the three numbers are no ratios but values in it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) metric: String,
    pub(crate) peer: String,
    pub(crate) unit: String,
    pub(crate) ratio_median: f64,
    pub(crate) ratio_low: f64,
    pub(crate) ratio_high: f64,
    pub(crate) blocks: usize,
}

/// A row with all that belongs to it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    /// The number of its row in the table of what is measured.
    pub(crate) number: u8,
    #[serde(flatten)]
    pub(crate) row: Row,
    pub(crate) target: Option<Target>,
    /// Whether the target is reached; none: there is none, or the figure is not to be relied on.
    pub(crate) reached: Option<bool>,
    /// Why the figure is not to be relied on, or what belongs to it.
    pub(crate) note: Option<String>,
    /// Whether it counts.
    pub(crate) reported: bool,
    /// The measurements of each block, or the values where there were no blocks.
    pub(crate) raw: Value,
}

impl Figure {
    /// What the blocks' ratios say.
    pub(crate) fn ratio(number: u8, metric: &str, peer: &str, unit: &str, blocks: &[Block]) -> Self {
        let values: Vec<f64> = blocks.iter().map(Block::ratio).collect();
        Self::of(number, (metric, peer, &format!("ratio of {unit}")), &values, json!(blocks))
    }

    /// How far B is beyond A.
    pub(crate) fn difference(number: u8, metric: &str, peer: &str, unit: &str, blocks: &[Block]) -> Self {
        let values: Vec<f64> = blocks.iter().map(Block::difference).collect();
        Self::of(number, (metric, peer, unit), &values, json!(blocks))
    }

    /// Values that stand for themselves.
    pub(crate) fn values(number: u8, metric: &str, peer: &str, unit: &str, values: &[f64]) -> Self {
        Self::of(number, (metric, peer, unit), values, json!(values))
    }

    fn of(number: u8, (metric, peer, unit): (&str, &str, &str), values: &[f64], raw: Value) -> Self {
        let interval = Interval::of(values);
        let row = Row {
            metric: metric.to_owned(),
            peer: peer.to_owned(),
            unit: unit.to_owned(),
            ratio_median: interval.median,
            ratio_low: interval.low,
            ratio_high: interval.high,
            blocks: values.len(),
        };
        // Not a number where something was compared with nothing.
        let reported = interval.median.is_finite();
        let note = (!reported).then(|| "there was nothing to compare with".to_owned());
        Self { number, row, target: None, reached: None, note, reported, raw }
    }

    /// With what it must reach.
    pub(crate) fn must(mut self, target: Target) -> Self {
        self.target = Some(target);
        self.reached = self.reported.then(|| target.holds(self.row.ratio_median));
        self
    }

    /// With a remark.
    pub(crate) fn note(mut self, text: impl Into<String>) -> Self {
        self.note.get_or_insert_with(|| text.into());
        self
    }

    /// Not to be relied on if the same compared with itself was not the same.
    pub(crate) fn controlled_by(mut self, control: &Self) -> Self {
        let Row { ratio_low: low, ratio_high: high, .. } = control.row;
        if !(low..=high).contains(&1.0) {
            (self.reported, self.reached) = (false, None);
            self.note = Some(format!("A/A interval {} … {} does not contain 1", number(low), number(high)));
        }
        self
    }

    fn line(&self) -> String {
        let Row { metric, peer, unit, ratio_median, ratio_low, ratio_high, blocks } = &self.row;
        let interval = format!("{} … {}", number(*ratio_low), number(*ratio_high));
        let target = self.target.map(Target::text).unwrap_or_default();
        let verdict = match (self.reported, self.reached) {
            (false, _) => "NOT REPORTED",
            (true, None) => "",
            (true, Some(true)) => "reached",
            (true, Some(false)) => "NOT REACHED",
        };
        let number_of = self.number;
        let median = number(*ratio_median);
        let line = format!(
            "{number_of:>2}  {metric:<44} {peer:<12} {median:>10}  {interval:<21} {blocks:>3}  {target:<16} {verdict:<12} {unit}"
        );
        match &self.note {
            Some(note) => format!("{}\n      {note}", line.trim_end()),
            None => line.trim_end().to_owned(),
        }
    }
}

/// Something that was not measured, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct NotRun {
    pub(crate) what: String,
    pub(crate) peer: String,
    pub(crate) reason: String,
}

/// All that a run found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) figures: Vec<Figure>,
    pub(crate) not_run: Vec<NotRun>,
}

impl Found {
    pub(crate) fn add(&mut self, figure: Figure) {
        say(&figure.line());
        self.figures.push(figure);
    }

    pub(crate) fn not_run(&mut self, what: &str, peer: &str, reason: impl Into<String>) {
        let one = NotRun { what: what.to_owned(), peer: peer.to_owned(), reason: reason.into() };
        say(&format!("    {what}, {peer}: not run: {}", one.reason));
        self.not_run.push(one);
    }

    /// The rows that count.
    pub(crate) fn rows(&self) -> Vec<&Row> {
        self.figures.iter().filter(|figure| figure.reported).map(|figure| &figure.row).collect()
    }

    /// The whole, for people.
    pub(crate) fn table(&self) -> String {
        let mut figures: Vec<&Figure> = self.figures.iter().collect();
        figures.sort_by_key(|figure| figure.number);
        let mut text = format!(
            "\nrow {:<44} {:<12} {:>10}  {:<21} {:>3}  {:<16}\n",
            "metric", "against", "median", "95 % interval", "n", "target"
        );
        for figure in figures {
            text.push_str(&figure.line());
            text.push('\n');
        }
        for NotRun { what, peer, reason } in &self.not_run {
            text.push_str(&format!("not run: {what}, {peer}: {reason}\n"));
        }
        let judged = || self.figures.iter().filter_map(|figure| figure.reached);
        let reached = judged().filter(|reached| *reached).count();
        text.push_str(&format!("{reached} of {} targets reached\n", judged().count()));
        text
    }
}

/// A number with three figures that count.
pub(crate) fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        size if size < 0.1 => 4,
        size if size < 10.0 => 3,
        size if size < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: [Block; 3] = [Block { a: [1.0, 1.0], b: [2.0, 2.0] }; 3];

    #[test]
    fn a_target_is_held_against_the_median() {
        let ratio = || Figure::ratio(8, "packets", "floor", "packets/s", &FAST);
        assert_eq!(ratio().must(Target::AtLeast(0.97)).reached, Some(true));
        assert_eq!(ratio().must(Target::AtMost(1.5)).reached, Some(false));
        assert_eq!(ratio().row.unit, "ratio of packets/s");
        assert_eq!(Figure::difference(12, "m", "p", "ns", &FAST).row.ratio_median, 1.0);
    }

    #[test]
    fn what_differs_from_itself_is_not_reported() {
        let control = Figure::ratio(8, "packets", "a/a", "packets/s", &FAST);
        let mut found = Found::default();
        let figure = Figure::ratio(8, "packets", "floor", "packets/s", &FAST).must(Target::AtLeast(0.97));
        found.add(figure.clone().controlled_by(&control));
        assert!(found.rows().is_empty() && found.figures[0].reached.is_none());
        assert!(found.table().contains("NOT REPORTED") && found.table().contains("0 of 0 targets"));
        let same = Figure::values(8, "packets", "a/a", "ratio", &[0.99, 1.01, 1.0]);
        found.add(figure.controlled_by(&same));
        assert_eq!((found.rows().len(), found.figures[1].reached), (1, Some(true)));
    }

    #[test]
    fn a_comparison_with_nothing_is_no_figure() {
        let nothing = [Block { a: [0.0; 2], b: [0.0; 2] }];
        let figure = Figure::ratio(3, "gap", "bridge", "µs", &nothing).must(Target::AtMost(1.0));
        assert!(!figure.reported && figure.reached.is_none());
    }

    #[test]
    fn rows_have_the_fields_that_are_promised() {
        let figure = Figure::ratio(8, "packets", "floor", "packets/s", &FAST);
        let value = serde_json::to_value(&figure.row).unwrap();
        let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["blocks", "metric", "peer", "ratio_high", "ratio_low", "ratio_median", "unit"]);
    }

    #[test]
    fn numbers_have_three_figures_that_count() {
        assert_eq!(
            [0.0, 0.01234, 1.2345, 12.345, 1234.5].map(number),
            ["0", "0.0123", "1.234", "12.3", "1234"]
        );
    }
}
