//! `datetime.strftime` for `strftime_now`, in the C locale.
//!
//! Templates print the date with it; the time is an argument, so that rendering stays a function of its inputs.

use std::fmt::Write;

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A moment as its calendar fields.
struct Civil {
    year: i64,
    /// 1 to 12.
    month: i64,
    /// 1 to 31.
    day: i64,
    /// From 0.
    day_of_year: i64,
    /// 0 = Sunday.
    weekday: i64,
    /// Second of the day.
    second: i64,
}

impl Civil {
    fn new(unix_s: i64) -> Self {
        let days = unix_s.div_euclid(86_400);
        // Days to year, month, day: the proleptic Gregorian calendar in eras of 400 years that begin in March.
        let z = days + 719_468;
        let era = z.div_euclid(146_097);
        let doe = z.rem_euclid(146_097);
        let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        let year = yoe + era * 400 + i64::from(month <= 2);
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let before =
            [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][usize::try_from(month - 1).unwrap_or(0)];
        let day = doy - (153 * mp + 2) / 5 + 1;
        Self {
            year,
            month,
            day,
            day_of_year: before + day - 1 + i64::from(leap && month > 2),
            weekday: (days + 4).rem_euclid(7),
            second: unix_s.rem_euclid(86_400),
        }
    }
}

/// `datetime.fromtimestamp(unix_s).strftime(format)`; unknown directives stay as they are.
pub(super) fn strftime(format: &str, unix_s: i64) -> String {
    let mut out = String::new();
    write_format(format, &Civil::new(unix_s), unix_s, &mut out);
    out
}

fn write_format(format: &str, t: &Civil, unix_s: i64, out: &mut String) {
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.clone();
        let mut next = directive.next();
        // glibc's flags: no padding, spaces, zeros, upper case.
        let flag = next.filter(|c| "-_0^".contains(*c));
        if flag.is_some() {
            next = directive.next();
        }
        let start = out.len();
        if next.is_some_and(|d| write_directive(d, flag, t, unix_s, out)) {
            rest = directive;
            if flag == Some('^') {
                let upper = out[start..].to_uppercase();
                out.truncate(start);
                out.push_str(&upper);
            }
        } else {
            out.push('%');
        }
    }
}

fn write_directive(directive: char, flag: Option<char>, t: &Civil, unix_s: i64, out: &mut String) -> bool {
    let (hour, minute, second) = (t.second / 3600, t.second / 60 % 60, t.second % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let weekday = usize::try_from(t.weekday).unwrap_or(0);
    let month = usize::try_from(t.month - 1).unwrap_or(0);
    let mut padded = |value: i64, width: usize, pad: char| {
        let pad = match flag {
            Some('-') => None,
            Some('_') => Some(' '),
            Some('0') => Some('0'),
            _ => Some(pad),
        };
        let _ = match pad {
            None => write!(out, "{value}"),
            Some(' ') => write!(out, "{value:>width$}"),
            Some(_) => write!(out, "{value:0>width$}"),
        };
    };
    match directive {
        'Y' => padded(t.year, 1, '0'),
        'C' => padded(t.year.div_euclid(100), 2, '0'),
        'y' => padded(t.year.rem_euclid(100), 2, '0'),
        'm' => padded(t.month, 2, '0'),
        'd' => padded(t.day, 2, '0'),
        'e' => padded(t.day, 2, ' '),
        'H' => padded(hour, 2, '0'),
        'I' => padded(hour12, 2, '0'),
        'k' => padded(hour, 2, ' '),
        'l' => padded(hour12, 2, ' '),
        'M' => padded(minute, 2, '0'),
        'S' => padded(second, 2, '0'),
        'f' => padded(0, 6, '0'),
        'j' => padded(t.day_of_year + 1, 3, '0'),
        'u' => padded((t.weekday + 6) % 7 + 1, 1, '0'),
        'w' => padded(t.weekday, 1, '0'),
        'U' => padded((t.day_of_year + 7 - t.weekday) / 7, 2, '0'),
        'W' => padded((t.day_of_year + 7 - (t.weekday + 6) % 7) / 7, 2, '0'),
        's' => padded(unix_s, 1, '0'),
        'a' => out.push_str(&DAYS[weekday][..3]),
        'A' => out.push_str(DAYS[weekday]),
        'b' | 'h' => out.push_str(&MONTHS[month][..3]),
        'B' => out.push_str(MONTHS[month]),
        'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
        'P' => out.push_str(if hour < 12 { "am" } else { "pm" }),
        'n' => out.push('\n'),
        't' => out.push('\t'),
        '%' => out.push('%'),
        // A naive datetime has no zone.
        'z' | 'Z' => {}
        'F' => write_format("%Y-%m-%d", t, unix_s, out),
        'D' | 'x' => write_format("%m/%d/%y", t, unix_s, out),
        'T' | 'X' => write_format("%H:%M:%S", t, unix_s, out),
        'R' => write_format("%H:%M", t, unix_s, out),
        'r' => write_format("%I:%M:%S %p", t, unix_s, out),
        'c' => write_format("%a %b %e %H:%M:%S %Y", t, unix_s, out),
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn fields_of_known_moments() {
        // 2024-02-29 is a Thursday in a leap year; 1700000000 is 2023-11-14 22:13:20.
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S %A %j", 1_700_000_000), "2023-11-14 22:13:20 Tuesday 318");
        assert_eq!(strftime("%d %b %Y %a %U %W %u", 1_709_210_096), "29 Feb 2024 Thu 08 09 4");
        assert_eq!(strftime("%-d %B %y %I %p %e %^a", 1_709_510_400), "4 March 24 12 AM  4 MON");
        assert_eq!(strftime("100% %Q %", 0), "100% %Q %");
        assert_eq!(strftime("%F %T %j", -1), "1969-12-31 23:59:59 365");
    }
}
