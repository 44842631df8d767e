//! A plot of the ratios as SVG: a point and its interval for each row, the target as a tick, on a logarithmic axis.

use std::fmt::Write as _;

use crate::report::{Figure, Target, number};

const LEFT: f64 = 430.0;
const WIDTH: f64 = 520.0;
const LINE: f64 = 20.0;
const TOP: f64 = 50.0;

/// From which value to which the axis goes: powers of two that hold everything, at least from a half to two.
fn range(figures: &[&Figure]) -> (f64, f64) {
    let mut all = figures.iter().flat_map(|f| [f.row.ratio_low, f.row.ratio_median, f.row.ratio_high]);
    let positive = |value: &f64| value.is_finite() && *value > 0.0;
    let (mut low, mut high): (f64, f64) = (0.5, 2.0);
    for value in all.by_ref().filter(positive) {
        (low, high) = (low.min(value), high.max(value));
    }
    let power = |value: f64, up: bool| {
        let exponent = value.log2();
        2f64.powf(if up { exponent.ceil() } else { exponent.floor() })
    };
    (power(low, false), power(high, true))
}

fn place(value: f64, (low, high): (f64, f64)) -> f64 {
    let share = (value.clamp(low, high) / low).ln() / (high / low).ln();
    LEFT + share * WIDTH
}

/// The plot of all ratios that are reported.
pub(crate) fn svg(title: &str, figures: &[Figure]) -> String {
    let ratios: Vec<&Figure> =
        figures.iter().filter(|f| f.reported && f.row.unit.starts_with("ratio")).collect();
    let range = range(&ratios);
    let height = TOP + LINE * ratios.len() as f64 + 30.0;
    let width = LEFT + WIDTH + 150.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\">{}</text>\n",
        escape(title)
    );
    axis(&mut text, range, height - 30.0);
    for (index, figure) in ratios.iter().enumerate() {
        line(&mut text, figure, TOP + LINE * (index as f64 + 0.5), range);
    }
    text.push_str("</svg>\n");
    text
}

fn axis(text: &mut String, range: (f64, f64), bottom: f64) {
    let mut value = range.0;
    // Not more marks than can be read.
    let step = 2f64.powf(((range.1 / range.0).log2() / 10.0).ceil().max(1.0));
    while value <= range.1 {
        let (x, colour) = (place(value, range), if value == 1.0 { "black" } else { "#ddd" });
        let _ = write!(
            text,
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"{colour}\"/>\n\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{value}</text>\n",
            bottom + 16.0
        );
        value *= step;
    }
}

fn line(text: &mut String, figure: &Figure, y: f64, range: (f64, f64)) {
    let row = &figure.row;
    let colour = match figure.reached {
        Some(true) => "#1a7f37",
        Some(false) => "#cf222e",
        None => "#57606a",
    };
    let x = [row.ratio_low, row.ratio_median, row.ratio_high].map(|value| place(value, range));
    let label = escape(&format!("{} / {}", row.metric, row.peer));
    let _ = write!(
        text,
        "<text x=\"10\" y=\"{:.1}\">{label}</text>\n\
         <line x1=\"{:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
         <circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>\n\
         <text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
        y + 4.0,
        x[0],
        x[2],
        x[1],
        LEFT + WIDTH + 20.0,
        y + 4.0,
        number(row.ratio_median)
    );
    if let Some(Target::AtLeast(limit) | Target::AtMost(limit)) = figure.target {
        let (x, y1, y2) = (place(limit, range), y - 7.0, y + 7.0);
        let _ = writeln!(
            text,
            "<line x1=\"{x:.1}\" y1=\"{y1:.1}\" x2=\"{x:.1}\" y2=\"{y2:.1}\" stroke=\"#0969da\" stroke-width=\"2\"/>"
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Block;

    fn ratio(b: f64) -> Figure {
        let block = Block { a: [1.0, 1.0], b: [b, b] };
        Figure::ratio(8, "a & b", "<floor>", "packets/s", &[block]).must(Target::AtLeast(0.97))
    }

    #[test]
    fn the_plot_has_a_point_for_each_ratio_and_nothing_else() {
        let value = Figure::values(12, "ns", "empty", "ns", &[12.0]);
        let text = svg("x < y", &[ratio(1.0), value, ratio(30.0)]);
        assert_eq!(text.matches("<circle").count(), 2);
        assert!(text.contains("a &amp; b / &lt;floor&gt;") && text.contains("x &lt; y"));
        assert!(text.starts_with("<svg") && text.ends_with("</svg>\n"));
        assert_eq!(text.matches("<line").count(), 2 + 2 + 7, "intervals, targets, marks from 0.5 to 32");
    }

    #[test]
    fn places_are_in_the_plot_in_their_order() {
        let range = range(&[&ratio(0.3), &ratio(5.0)]);
        assert_eq!(range, (0.25, 8.0));
        let x = [0.0, 0.3, 1.0, 5.0, 100.0].map(|value| place(value, range));
        assert!(x.is_sorted() && x[0] >= LEFT && x[4] <= LEFT + WIDTH, "{x:?}");
    }
}
