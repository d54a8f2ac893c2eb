//! Two kinds of plots as plain SVG: lines on logarithmic axes, and groups of bars.
//!
//! By hand, because a plotting crate would be the largest dependency of this workspace and its files would differ from version to
//! version.

use std::fmt::Write;

/// One contender's line or bars; `None` where it has no figure.
pub struct Series {
    /// Its name.
    pub name: String,
    /// One value for each label of the axis.
    pub values: Vec<Option<f64>>,
}

/// One set of axes.
pub struct Panel {
    /// What it shows, with the unit.
    pub title: String,
    /// Labels along the x axis.
    pub labels: Vec<String>,
    /// The contenders.
    pub series: Vec<Series>,
}

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 220.0;
const MARGIN: f64 = 46.0;

/// Dark enough on white, bright enough on black; ours is the last contender everywhere and gets the warm colour.
fn colour(name: &str) -> &'static str {
    match name {
        "dynamo" => "#4477aa",
        "dynamo-inner" => "#88bbdd",
        "dynamo-radix" => "#66ccee",
        "chain" => "#228833",
        "chain-into" => "#99bb55",
        "kvlane-hashed" | "kvlane round-robin" => "#ee9966",
        name if name.starts_with("kvlane") => "#dd4433",
        "direct" => "#999999",
        "nginx" => "#4477aa",
        "smg" => "#228833",
        "vllm-router" => "#aa66bb",
        _ => "#bbaa33",
    }
}

fn begin(columns: usize, rows: usize) -> String {
    let (width, height) = (WIDTH * columns as f64, HEIGHT * rows as f64 + 24.0);
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' \
         font-family='sans-serif' font-size='10'>\n<rect width='100%' height='100%' fill='#fff'/>\n"
    )
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}' fill='#333'>{words}</text>");
}

fn legend(svg: &mut String, names: &[&str], y: f64) {
    let mut x = MARGIN;
    for name in names {
        let colour = colour(name);
        let _ = writeln!(svg, "<rect x='{x:.1}' y='{:.1}' width='10' height='10' fill='{colour}'/>", y - 9.0);
        text(svg, x + 14.0, y, "start", name);
        x += 30.0 + name.len() as f64 * 6.0;
    }
}

fn number(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.0}M", v / 1e6),
        v if v >= 1e3 => format!("{:.0}k", v / 1e3),
        v if v >= 10.0 => format!("{v:.0}"),
        v => format!("{v:.1}"),
    }
}

/// Maps values to heights on a logarithmic axis with a line at each power of ten.
struct LogAxis {
    low: f64,
    high: f64,
    top: f64,
}

impl LogAxis {
    fn over(panel: &Panel, top: f64) -> Self {
        let all = || panel.series.iter().flat_map(|s| s.values.iter().flatten()).filter(|v| **v > 0.0);
        let low = all().copied().fold(f64::MAX, f64::min).log10().floor();
        let high = all().copied().fold(f64::MIN, f64::max).log10().ceil().max(low + 1.0);
        Self { low, high, top }
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value.max(1e-9).log10() - self.low) / (self.high - self.low);
        self.top + 28.0 + (1.0 - share.clamp(0.0, 1.0)) * (HEIGHT - 64.0)
    }

    fn draw(&self, svg: &mut String, left: f64) {
        for power in self.low as i32..=self.high as i32 {
            let y = self.y(10f64.powi(power));
            let _ = writeln!(
                svg,
                "<line x1='{:.1}' x2='{:.1}' y1='{y:.1}' y2='{y:.1}' stroke='#ddd'/>",
                left + MARGIN,
                left + WIDTH - 8.0
            );
            text(svg, left + MARGIN - 4.0, y + 3.0, "end", &number(10f64.powi(power)));
        }
    }
}

fn names(panels: &[Panel]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for series in panels.iter().flat_map(|p| &p.series) {
        if !names.contains(&series.name.as_str()) {
            names.push(&series.name);
        }
    }
    names
}

/// Panels of lines, `columns` a row, values on a logarithmic axis.
pub fn lines(panels: &[Panel], columns: usize) -> String {
    let rows = panels.len().div_ceil(columns);
    let mut svg = begin(columns, rows);
    for (at, panel) in panels.iter().enumerate() {
        let (left, top) = ((at % columns) as f64 * WIDTH, (at / columns) as f64 * HEIGHT);
        let axis = LogAxis::over(panel, top);
        axis.draw(&mut svg, left);
        text(&mut svg, left + MARGIN, top + 18.0, "start", &panel.title);
        let span = WIDTH - MARGIN - 24.0;
        let x = |i: usize| left + MARGIN + 8.0 + span * i as f64 / (panel.labels.len().max(2) - 1) as f64;
        for (i, label) in panel.labels.iter().enumerate() {
            text(&mut svg, x(i), top + HEIGHT - 22.0, "middle", label);
        }
        for series in &panel.series {
            let points: Vec<(f64, f64)> = (series.values.iter().enumerate())
                .filter_map(|(i, value)| value.map(|v| (x(i), axis.y(v))))
                .collect();
            let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let colour = colour(&series.name);
            let _ = writeln!(
                svg,
                "<polyline points='{}' fill='none' stroke='{colour}' stroke-width='2'/>",
                path.join(" ")
            );
            for (x, y) in points {
                let _ = writeln!(svg, "<circle cx='{x:.1}' cy='{y:.1}' r='2.5' fill='{colour}'/>");
            }
        }
    }
    legend(&mut svg, &names(panels), rows as f64 * HEIGHT + 12.0);
    svg + "</svg>\n"
}

/// One panel of bars, as wide as it needs, values from 0 and written on top.
pub fn bars(panel: &Panel) -> String {
    let group = panel.series.len() as f64 * 22.0 + 18.0;
    let columns = ((group * panel.labels.len() as f64 + MARGIN + 16.0) / WIDTH).ceil().max(2.0);
    let mut svg = begin(columns as usize, 1);
    text(&mut svg, MARGIN, 18.0, "start", &panel.title);
    let highest = panel.series.iter().flat_map(|s| s.values.iter().flatten()).copied().fold(1e-9, f64::max);
    let (floor, room) = (HEIGHT - 36.0, HEIGHT - 80.0);
    for (i, label) in panel.labels.iter().enumerate() {
        let left = MARGIN + group * i as f64;
        text(&mut svg, left + (group - 18.0) / 2.0, floor + 14.0, "middle", label);
        for (j, series) in panel.series.iter().enumerate() {
            let Some(value) = series.values[i] else { continue };
            let (x, height) = (left + j as f64 * 22.0, value / highest * room);
            let colour = colour(&series.name);
            let _ = writeln!(
                svg,
                "<rect x='{x:.1}' y='{:.1}' width='20' height='{height:.1}' fill='{colour}'/>",
                floor - height
            );
            text(&mut svg, x + 10.0, floor - height - 3.0, "middle", &number(value));
        }
    }
    legend(&mut svg, &names(std::slice::from_ref(panel)), HEIGHT + 12.0);
    svg + "</svg>\n"
}
