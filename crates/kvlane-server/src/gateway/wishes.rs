//! Where a request must or would rather go, by its headers.
//!
//! | header | meaning |
//! |---|---|
//! | `x-kvlane-worker: HOST:PORT` or `HOST:PORT/RANK` | only there: the name that responses carry; several, by commas: only at one of them |
//! | `x-data-parallel-rank: N` | only at this rank of an engine |
//! | `x-kvlane-require: zone=a, gpu=h100` | only at workers with all these labels |
//! | `x-kvlane-prefer: zone=a, rack=7@250` | rather there: worth so many milliseconds ([`PREFERENCE_MS`] unless said) to a policy that decides in time |

use super::Table;
use super::error::ClientError;
use super::forward::X_WORKER;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use kvlane_index::Worker;
use kvlane_sched::{Pin, Wishes};
use xxhash_rust::xxh3::xxh3_64;

/// What a preference is worth unless it says so: about a prefill of a thousand tokens.
const PREFERENCE_MS: f64 = 100.0;
/// The most that one may be worth.
const PREFERENCE_MS_MAX: f64 = 60_000.0;
/// Labels or workers that one header may name.
const NAMES_MAX: usize = 16;

const X_RANK: &str = "x-data-parallel-rank";
const X_REQUIRE: HeaderName = HeaderName::from_static("x-kvlane-require");
const X_PREFER: HeaderName = HeaderName::from_static("x-kvlane-prefer");

/// What a request asks for.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    required: Vec<Box<str>>,
    preferred: Vec<(Box<str>, f64)>,
    allowed: Option<Vec<Worker>>,
    /// The worker, instance or rank that it insists on.
    pub(super) pinned: Option<Pin>,
}

impl Wanted {
    /// From the headers.
    pub(super) fn of(headers: &HeaderMap, table: &Table) -> Result<Self, ClientError> {
        let (allowed, pinned) = workers(headers, table)?;
        Ok(Self { required: required(headers)?, preferred: preferred(headers)?, allowed, pinned })
    }

    /// For the scheduler.
    pub(super) fn wishes(&self) -> Wishes<'_> {
        Wishes { required: &self.required, preferred: &self.preferred, allowed: self.allowed.as_deref() }
    }

    /// Whether it says by name where to go.
    pub(super) fn names_workers(&self) -> bool {
        self.allowed.is_some() || matches!(self.pinned, Some(Pin::Instance(_) | Pin::Worker(_)))
    }

    /// Equal for requests that may go to the same workers.
    pub(super) fn lane(&self) -> u64 {
        let worker = |worker: &Worker| xxh3_64(worker.to_string().as_bytes());
        let pinned = match &self.pinned {
            None => 0,
            Some(Pin::Rank(rank)) => u64::from(*rank) + 1,
            Some(Pin::Instance(instance)) => xxh3_64(&instance.0.to_le_bytes()),
            Some(Pin::Worker(pinned)) => worker(pinned),
        };
        let labels = self.required.iter().map(|label| xxh3_64(label.as_bytes()));
        let allowed = self.allowed.iter().flatten().map(worker);
        labels.chain(allowed).fold(pinned.rotate_left(32), |lane, part| lane.rotate_left(7) ^ part)
    }
}

/// The parts of a header that is a list by commas and may be repeated; `None` if there are too many, or one is not text.
fn list<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<Vec<&'h str>> {
    let mut parts = Vec::new();
    for value in headers.get_all(name) {
        parts.extend(value.to_str().ok()?.split(',').map(str::trim).filter(|part| !part.is_empty()));
    }
    (parts.len() <= NAMES_MAX).then_some(parts)
}

fn is_label(text: &str) -> bool {
    text.split_once('=').is_some_and(|(key, value)| !key.is_empty() && !value.is_empty())
}

fn required(headers: &HeaderMap) -> Result<Vec<Box<str>>, ClientError> {
    let labels = list(headers, &X_REQUIRE).filter(|labels| labels.iter().all(|label| is_label(label)));
    let labels = labels.ok_or_else(|| {
        ClientError::bad_request(format!(
            "`{X_REQUIRE}` is a list of at most {NAMES_MAX} labels, key=value, as workers have them (see /kvlane/workers)."
        ))
    })?;
    Ok(labels.into_iter().map(Into::into).collect())
}

fn preferred(headers: &HeaderMap) -> Result<Vec<(Box<str>, f64)>, ClientError> {
    let one = |text: &str| {
        let (label, worth) = text.split_once('@').map_or((text, None), |(label, worth)| (label, Some(worth)));
        let ms = worth.map_or(Some(PREFERENCE_MS), |worth| worth.trim().parse::<f64>().ok())?;
        let good = is_label(label) && (0.0..=PREFERENCE_MS_MAX).contains(&ms);
        good.then(|| (label.trim().into(), ms))
    };
    let preferred = list(headers, &X_PREFER).and_then(|parts| parts.into_iter().map(one).collect());
    preferred.ok_or_else(|| {
        ClientError::bad_request(format!(
            "`{X_PREFER}` is a list of at most {NAMES_MAX} key=value or key=value@MILLISECONDS, from 0 to {PREFERENCE_MS_MAX}."
        ))
    })
}

/// The only workers that may serve it, or the one place that must.
fn workers(headers: &HeaderMap, table: &Table) -> Result<(Option<Vec<Worker>>, Option<Pin>), ClientError> {
    let rank = headers.get(X_RANK).map(rank).transpose()?;
    let unknown = || {
        ClientError::bad_request(format!(
            "`{X_WORKER}` names a worker that is not here, or more than {NAMES_MAX}; see /kvlane/workers for their names."
        ))
    };
    let names = list(headers, &X_WORKER).ok_or_else(unknown)?;
    let (name, several) = match names.as_slice() {
        [] => return Ok((None, rank.map(Pin::Rank))),
        [name] => (*name, false),
        [name, ..] => (*name, true),
    };
    if several {
        let mut allowed = Vec::new();
        for name in names {
            allowed.extend(named(name, table).ok_or_else(unknown)?.1);
        }
        return Ok((Some(allowed), rank.map(Pin::Rank)));
    }
    let (pin, _) = named(name, table).ok_or_else(unknown)?;
    match (pin, rank) {
        (Pin::Instance(instance), Some(rank)) => Ok((None, Some(Pin::Worker(Worker { instance, rank })))),
        (Pin::Worker(worker), Some(rank)) if worker.rank != rank => Err(ClientError::bad_request(format!(
            "`{X_WORKER}` and `{X_RANK}` name different ranks: send one of them."
        ))),
        (pin, _) => Ok((None, Some(pin))),
    }
}

/// The instance or worker of this name, with all its workers.
fn named(name: &str, table: &Table) -> Option<(Pin, Vec<Worker>)> {
    let of = |upstream: &super::Upstream| upstream.ranks.iter().map(|rank| rank.worker).collect();
    if let Some(instance) = table.upstreams().iter().find(|upstream| upstream.name == name) {
        return Some((Pin::Instance(instance.id), of(instance)));
    }
    let mut ranks = table.upstreams().iter().flat_map(|upstream| &upstream.ranks);
    let worker = ranks.find(|facts| facts.name == name)?.worker;
    Some((Pin::Worker(worker), vec![worker]))
}

fn rank(value: &HeaderValue) -> Result<u32, ClientError> {
    let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    number.ok_or_else(|| ClientError::bad_request(format!("`{X_RANK}` must be a number.")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_lists_and_preferences_have_a_worth() {
        let header = |text: &str| HeaderValue::from_str(text).expect("a header");
        let mut headers = HeaderMap::new();
        headers.append(X_REQUIRE, header("zone=a, gpu=h100"));
        headers.append(X_REQUIRE, header("rack=7"));
        headers.append(X_PREFER, header("zone=b@2.5,zone=c"));
        let wanted = Wanted::of(&headers, &Table::default()).expect("good lists");
        let wishes = wanted.wishes();
        assert_eq!(
            wishes.required.iter().map(|l| &**l).collect::<Vec<_>>(),
            ["zone=a", "gpu=h100", "rack=7"]
        );
        assert_eq!(wishes.preferred, [("zone=b".into(), 2.5), ("zone=c".into(), PREFERENCE_MS)]);
        let many = vec!["a=b"; NAMES_MAX + 1].join(",");
        for (name, wrong) in [
            (X_REQUIRE, "zone"),
            (X_REQUIRE, "=a"),
            (X_REQUIRE, &many),
            (X_PREFER, "zone=a@soon"),
            (X_PREFER, "zone=a@-1"),
            (X_PREFER, "zone@1"),
            (X_WORKER, "nowhere:1"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, header(wrong));
            let error = Wanted::of(&headers, &Table::default()).expect_err(wrong);
            assert_eq!(error.status, 400, "{wrong}");
        }
    }
}
