//! What routers over the same engines tell each other of their work in flight.
//!
//! Loads are absolute, never differences: a message that says something twice does no harm, and one that was lost is made good by the next. A message
//! holds what changed since the number that the asker has seen, or everything, if that number is not of this life of the teller.

use kvlane_sched::{Busy, Load};

/// `GET /kvlane/loads?boot=…&after=…`, answered.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Loads {
    /// Fresh for each life of the teller.
    #[prost(fixed64, tag = "1")]
    pub(crate) boot: u64,
    /// Rises with every change; what to ask for changes after.
    #[prost(uint64, tag = "2")]
    pub(crate) sequence: u64,
    /// Whether `ranks` is all that is in flight; else what it does not name is as it was.
    #[prost(bool, tag = "3")]
    pub(crate) full: bool,
    /// Work in flight.
    #[prost(message, repeated, tag = "4")]
    pub(crate) ranks: Vec<RankLoad>,
    /// [`Busy::prefill_ms`], at the time of telling.
    #[prost(double, tag = "5")]
    pub(crate) busy_prefill_ms: f64,
    /// [`Busy::bookings`], at the time of telling.
    #[prost(double, tag = "6")]
    pub(crate) busy_bookings: f64,
}

impl Loads {
    /// What the teller booked of late, on the clock of whoever hears it.
    pub(super) fn busy(&self, now_ms: f64) -> Busy {
        let told = |value: f64| if value.is_finite() { value.clamp(0.0, 1e12) } else { 0.0 };
        Busy { prefill_ms: told(self.busy_prefill_ms), bookings: told(self.busy_bookings), at_ms: now_ms }
    }
}

/// Work that one router has in flight at one worker.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RankLoad {
    /// The engine as `host:port`: numbers of instances differ between routers.
    #[prost(string, tag = "1")]
    pub(crate) engine: String,
    /// Data-parallel rank.
    #[prost(uint32, tag = "2")]
    pub(crate) rank: u32,
    /// As [`Load::prefill_requests`].
    #[prost(uint32, tag = "3")]
    pub(crate) prefill_requests: u32,
    /// As [`Load::prefill_tokens`].
    #[prost(uint64, tag = "4")]
    pub(crate) prefill_tokens: u64,
    /// As [`Load::prefill_ms`], in microseconds.
    #[prost(uint64, tag = "5")]
    pub(crate) prefill_us: u64,
    /// As [`Load::head_prefill_ms`], in microseconds.
    #[prost(uint64, tag = "6")]
    pub(crate) head_prefill_us: u64,
    /// Time since [`Load::prefill_since_ms`], in microseconds: clocks differ.
    #[prost(uint64, tag = "7")]
    pub(crate) prefill_age_us: u64,
    /// As [`Load::decode_requests`].
    #[prost(uint32, tag = "8")]
    pub(crate) decode_requests: u32,
    /// As [`Load::decode_tokens`].
    #[prost(uint64, tag = "9")]
    pub(crate) decode_tokens: u64,
    /// As [`Load::prompt_tokens`].
    #[prost(uint64, tag = "10")]
    pub(crate) prompt_tokens: u64,
    /// As [`Load::partial_tokens`].
    #[prost(uint64, tag = "11")]
    pub(crate) partial_tokens: u64,
    /// As [`Load::output_tokens`].
    #[prost(uint64, tag = "12")]
    pub(crate) output_tokens: u64,
}

impl RankLoad {
    /// A load as it is told.
    pub(super) fn new(engine: &str, rank: u32, load: &Load, now_ms: f64) -> Self {
        let us = |ms: f64| (ms * 1e3).max(0.0) as u64;
        let Load {
            prefill_requests,
            prefill_tokens,
            prefill_ms,
            decode_requests,
            decode_tokens,
            prompt_tokens,
            partial_tokens,
            output_tokens,
            head_prefill_ms,
            prefill_since_ms,
            last_booking: _,
        } = *load;
        Self {
            engine: engine.to_owned(),
            rank,
            prefill_requests,
            prefill_tokens,
            prefill_us: us(prefill_ms),
            head_prefill_us: us(head_prefill_ms),
            prefill_age_us: us(now_ms - prefill_since_ms),
            decode_requests,
            decode_tokens,
            prompt_tokens,
            partial_tokens,
            output_tokens,
        }
    }

    /// What was told, on the clock of whoever hears it, and held to what a router can have in flight: sums of these must not overflow.
    pub(super) fn load(&self, now_ms: f64) -> Load {
        /// Requests, and tokens or microseconds, at one worker; more is not believed.
        const MOST: (u32, u64) = (1 << 20, 1 << 40);
        let ms = |us: u64| us.min(MOST.1) as f64 / 1e3;
        Load {
            prefill_requests: self.prefill_requests.min(MOST.0),
            prefill_tokens: self.prefill_tokens.min(MOST.1),
            prefill_ms: ms(self.prefill_us),
            decode_requests: self.decode_requests.min(MOST.0),
            decode_tokens: self.decode_tokens.min(MOST.1),
            prompt_tokens: self.prompt_tokens.min(MOST.1),
            partial_tokens: self.partial_tokens.min(MOST.1),
            output_tokens: self.output_tokens.min(MOST.1),
            head_prefill_ms: ms(self.head_prefill_us.min(self.prefill_us)),
            prefill_since_ms: now_ms - ms(self.prefill_age_us),
            last_booking: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn a_load_survives_the_way_from_one_clock_to_another() {
        let load = Load {
            prefill_requests: 2,
            prefill_tokens: 5_000,
            prefill_ms: 700.0,
            decode_requests: 3,
            decode_tokens: 9_000,
            prompt_tokens: 12_000,
            partial_tokens: 100,
            output_tokens: 300,
            head_prefill_ms: 400.0,
            prefill_since_ms: 900.0,
            last_booking: 17,
        };
        let bytes = RankLoad::new("e:1", 4, &load, 1_000.0).encode_to_vec();
        assert!(bytes.len() < 64, "{} bytes", bytes.len());
        let heard = RankLoad::decode(&bytes[..]).unwrap();
        assert_eq!((heard.engine.as_str(), heard.rank), ("e:1", 4));
        let here = heard.load(50.0);
        assert_eq!(here, Load { prefill_since_ms: -50.0, last_booking: 0, ..load });
        assert_eq!(here.queue_ms(50.0), load.queue_ms(1_000.0));
    }

    #[test]
    fn what_no_router_has_in_flight_is_cut() {
        let most = RankLoad {
            prefill_requests: u32::MAX,
            prefill_us: 5,
            head_prefill_us: u64::MAX,
            decode_tokens: u64::MAX,
            ..RankLoad::default()
        };
        let load = most.load(0.0);
        assert_eq!((load.prefill_requests, load.decode_tokens), (1 << 20, 1 << 40));
        assert!(load.head_prefill_ms <= load.prefill_ms);
        let wild = Loads { busy_prefill_ms: f64::NAN, busy_bookings: -1.0, ..Loads::default() };
        assert_eq!(wild.busy(3.0), Busy { prefill_ms: 0.0, bookings: 0.0, at_ms: 3.0 });
    }
}
