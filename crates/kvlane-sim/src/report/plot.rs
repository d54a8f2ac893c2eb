//! Line plots as SVG, without scripts or fonts of their own.

use std::fmt::Write;

/// One line.
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    pub(super) points: Vec<(f64, f64)>,
    /// Drawn thin and dashed: a bound, not a measurement.
    pub(super) bound: bool,
}

/// One plot.
pub(super) struct Plot<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    pub(super) log_x: bool,
    pub(super) lines: Vec<Line<'a>>,
}

/// Colours told apart by people who see few (Okabe and Ito).
const COLOURS: [&str; 8] =
    ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#b0a000"];

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 44.0;

/// Colour of the n-th policy.
pub(super) fn colour(n: usize) -> &'static str {
    COLOURS[n % COLOURS.len()]
}

/// The plot as an `<svg>` element.
pub(super) fn svg(plot: &Plot<'_>) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_svg(plot, &mut out);
    out
}

fn write_svg(plot: &Plot<'_>, out: &mut String) -> std::fmt::Result {
    let points = || plot.lines.iter().flat_map(|l| &l.points);
    let (mut x0, mut x1) = range(points().map(|p| p.0).filter(|x| !plot.log_x || *x > 0.0));
    let (mut y0, mut y1) = range(points().map(|p| p.1));
    y0 = y0.min(0.0);
    if y1 <= y0 {
        y1 = y0 + 1.0;
    }
    y1 += (y1 - y0) * 0.02;
    if plot.log_x {
        x0 = 10f64.powf(x0.max(1e-3).log10().floor());
        x1 = 10f64.powf(x1.max(x0 * 10.0).log10().ceil());
    }
    if x1 <= x0 {
        x1 = x0 + 1.0;
    }
    let at_x = |x: f64| {
        let share = if plot.log_x { (x.max(x0) / x0).ln() / (x1 / x0).ln() } else { (x - x0) / (x1 - x0) };
        LEFT + share * (WIDTH - LEFT - RIGHT)
    };
    let at_y = |y: f64| HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);

    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">"
    )?;
    writeln!(out, "<text x=\"{LEFT}\" y=\"18\" class=\"title\">{}</text>", plot.title)?;
    let bottom = HEIGHT - BOTTOM;
    for tick in if plot.log_x { decades(x0, x1) } else { ticks(x0, x1) } {
        let x = at_x(tick);
        writeln!(out, "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" class=\"grid\"/>")?;
        writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"middle\">{}</text>",
            bottom + 14.0,
            label(tick)
        )?;
    }
    for tick in ticks(y0, y1) {
        let y = at_y(tick);
        writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" class=\"grid\"/>",
            WIDTH - RIGHT
        )?;
        writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"end\">{}</text>",
            LEFT - 5.0,
            y + 3.5,
            label(tick)
        )?;
    }
    writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"middle\">{}</text>",
        (LEFT + WIDTH) / 2.0,
        HEIGHT - 8.0,
        plot.x
    )?;
    writeln!(
        out,
        "<text x=\"12\" y=\"{0:.1}\" class=\"tick\" text-anchor=\"middle\" transform=\"rotate(-90 12 {0:.1})\">{1}</text>",
        (TOP + bottom) / 2.0,
        plot.y
    )?;
    for (n, line) in plot.lines.iter().enumerate() {
        let class = if line.bound { "bound" } else { "line" };
        write!(out, "<polyline class=\"{class}\" stroke=\"{}\" points=\"", colour(n))?;
        for (x, y) in &line.points {
            write!(out, "{:.1},{:.1} ", at_x(*x), at_y(*y))?;
        }
        writeln!(out, "\"><title>{}</title></polyline>", line.name)?;
    }
    writeln!(out, "</svg>")
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low <= high { (low, high) } else { (0.0, 1.0) }
}

/// About five round numbers between the ends.
fn ticks(from: f64, to: f64) -> Vec<f64> {
    let rough = (to - from) / 5.0;
    let unit = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * unit).find(|s| *s >= rough).unwrap_or(rough);
    let first = (from / step).ceil() as i64;
    let last = (to / step).floor() as i64;
    (first..=last.min(first + 20)).map(|i| i as f64 * step).collect()
}

fn decades(from: f64, to: f64) -> Vec<f64> {
    let (first, last) = (from.log10().round() as i32, to.log10().round() as i32);
    (first..=last.min(first + 20)).map(|e| 10f64.powi(e)).collect()
}

fn label(value: f64) -> String {
    if value.abs() >= 1e6 {
        format!("{}M", value / 1e6)
    } else if value.abs() >= 1e4 {
        format!("{}k", value / 1e3)
    } else if value == value.round() {
        format!("{value}")
    } else {
        format!("{value:.3}").trim_end_matches('0').to_owned()
    }
}
