//! A cursor over MessagePack bytes that cannot panic, recurse or over-allocate.
//!
//! Why not `rmp` or `rmp-serde`: a decoder of engine events must survive an element that it does not understand
//! (skip it, keep the batch), read positional and keyed forms into the same fields, and borrow strings. A serde data
//! model gives up the batch on the first surprise. What is left of a MessagePack library after that is this file.
//!
//! Every declared length is checked against the bytes that remain before anything is reserved, and an element takes at
//! least one byte, so memory is bounded by the size of the input. [`Reader::skip`] counts instead of recursing.

/// The bytes are not MessagePack, or end too early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Malformed;

/// What comes next in the input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Nil,
    Bool,
    Int,
    Float,
    Str,
    Bin,
    Array,
    Map,
    Ext,
}

/// An integer of either sign, with all its bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Int {
    /// Zero or more.
    Unsigned(u64),
    /// Less than zero.
    Negative(i64),
}

impl Int {
    /// The 64-bit two's complement pattern: -1 and 2^64-1 are the same.
    pub(crate) fn bits(self) -> u64 {
        match self {
            Self::Unsigned(v) => v,
            Self::Negative(v) => v as u64,
        }
    }
}

/// How an unsigned integer of at most 32 bits lies in the first 8 bytes: shift left, then right; 0 bytes = it is none.
#[derive(Clone, Copy)]
struct Form {
    size: u8,
    left: u8,
    right: u8,
}

const FORMS: [Form; 256] = {
    let mut forms = [Form { size: 0, left: 0, right: 0 }; 256];
    let mut marker = 0;
    while marker < 0x80 {
        forms[marker] = Form { size: 1, left: 0, right: 56 };
        marker += 1;
    }
    forms[0xcc] = Form { size: 2, left: 8, right: 56 };
    forms[0xcd] = Form { size: 3, left: 8, right: 48 };
    forms[0xce] = Form { size: 5, left: 8, right: 32 };
    forms
};

/// The unread rest of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The bytes between an earlier position of the same reader and this one.
    pub(crate) fn since(&self, earlier: &Self) -> &'a [u8] {
        &earlier.rest[..earlier.rest.len() - self.rest.len()]
    }

    #[inline]
    fn byte(&mut self) -> Result<u8, Malformed> {
        let (&first, rest) = self.rest.split_first().ok_or(Malformed)?;
        self.rest = rest;
        Ok(first)
    }

    #[inline]
    fn take(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed)?;
        self.rest = rest;
        Ok(*taken)
    }

    #[inline]
    fn be(&mut self, width: u32) -> Result<usize, Malformed> {
        Ok(match width {
            1 => usize::from(self.byte()?),
            2 => usize::from(u16::from_be_bytes(self.fixed()?)),
            _ => u32::from_be_bytes(self.fixed()?) as usize,
        })
    }

    /// Consumes exactly this string (of fewer than 32 bytes, in its shortest form) if it is next.
    #[inline]
    pub(crate) fn literal<const N: usize>(&mut self, text: &[u8; N]) -> bool {
        const { assert!(N < 32, "of the form with the length in its marker") };
        match self.rest.split_first() {
            Some((&marker, rest)) if usize::from(marker) == 0xa0 | N => match rest.split_first_chunk::<N>() {
                Some((next, rest)) if next == text => {
                    self.rest = rest;
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// An unsigned integer in its widest form, which is how engines print hashes.
    #[inline]
    pub(crate) fn wide(&mut self) -> Option<u64> {
        let (next, rest) = self.rest.split_first_chunk::<9>()?;
        let [0xcf, value @ ..] = next else { return None };
        self.rest = rest;
        Some(u64::from_be_bytes(*value))
    }

    /// The kind of the next element.
    #[inline]
    pub(crate) fn peek(&self) -> Result<Kind, Malformed> {
        Ok(match *self.rest.first().ok_or(Malformed)? {
            0x00..=0x7f | 0xcc..=0xd3 | 0xe0..=0xff => Kind::Int,
            0x80..=0x8f | 0xde | 0xdf => Kind::Map,
            0x90..=0x9f | 0xdc | 0xdd => Kind::Array,
            0xa0..=0xbf | 0xd9..=0xdb => Kind::Str,
            0xc0 => Kind::Nil,
            0xc1 => return Err(Malformed),
            0xc2 | 0xc3 => Kind::Bool,
            0xc4..=0xc6 => Kind::Bin,
            0xc7..=0xc9 | 0xd4..=0xd8 => Kind::Ext,
            0xca | 0xcb => Kind::Float,
        })
    }

    /// Consumes a nil if one is next.
    #[inline]
    pub(crate) fn nil(&mut self) -> bool {
        match self.rest {
            [0xc0, rest @ ..] => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// The length of the array that starts here; `None` (and nothing consumed) for another kind.
    #[inline]
    pub(crate) fn array(&mut self) -> Result<Option<usize>, Malformed> {
        let before = self.rest;
        let len = match self.byte()? {
            m @ 0x90..=0x9f => usize::from(m & 0x0f),
            0xdc => self.be(2)?,
            0xdd => self.be(4)?,
            _ => {
                self.rest = before;
                return Ok(None);
            }
        };
        if len > self.rest.len() { Err(Malformed) } else { Ok(Some(len)) }
    }

    /// The number of pairs of the map that starts here; `None` (and nothing consumed) for another kind.
    #[inline]
    pub(crate) fn map(&mut self) -> Result<Option<usize>, Malformed> {
        let before = self.rest;
        let len = match self.byte()? {
            m @ 0x80..=0x8f => usize::from(m & 0x0f),
            0xde => self.be(2)?,
            0xdf => self.be(4)?,
            _ => {
                self.rest = before;
                return Ok(None);
            }
        };
        if len > self.rest.len() / 2 { Err(Malformed) } else { Ok(Some(len)) }
    }

    /// A string's bytes (UTF-8 unchecked); `None` (and nothing consumed) for another kind.
    #[inline]
    pub(crate) fn str_bytes(&mut self) -> Result<Option<&'a [u8]>, Malformed> {
        let before = self.rest;
        let len = match self.byte()? {
            m @ 0xa0..=0xbf => usize::from(m & 0x1f),
            0xd9 => self.be(1)?,
            0xda => self.be(2)?,
            0xdb => self.be(4)?,
            _ => {
                self.rest = before;
                return Ok(None);
            }
        };
        self.take(len).map(Some)
    }

    /// A bin's bytes; `None` (and nothing consumed) for another kind.
    #[inline]
    pub(crate) fn bin(&mut self) -> Result<Option<&'a [u8]>, Malformed> {
        let before = self.rest;
        let len = match self.byte()? {
            0xc4 => self.be(1)?,
            0xc5 => self.be(2)?,
            0xc6 => self.be(4)?,
            _ => {
                self.rest = before;
                return Ok(None);
            }
        };
        self.take(len).map(Some)
    }

    /// An integer of any width and sign; `None` (and nothing consumed) for another kind.
    #[inline]
    pub(crate) fn int(&mut self) -> Result<Option<Int>, Malformed> {
        fn signed(v: i64) -> Int {
            u64::try_from(v).map_or(Int::Negative(v), Int::Unsigned)
        }
        let before = self.rest;
        Ok(Some(match self.byte()? {
            m @ 0x00..=0x7f => Int::Unsigned(u64::from(m)),
            m @ 0xe0..=0xff => Int::Negative(i64::from(m as i8)),
            0xcc => Int::Unsigned(u64::from(self.byte()?)),
            0xcd => Int::Unsigned(u64::from(u16::from_be_bytes(self.fixed()?))),
            0xce => Int::Unsigned(u64::from(u32::from_be_bytes(self.fixed()?))),
            0xcf => Int::Unsigned(u64::from_be_bytes(self.fixed()?)),
            0xd0 => signed(i64::from(self.byte()? as i8)),
            0xd1 => signed(i64::from(i16::from_be_bytes(self.fixed()?))),
            0xd2 => signed(i64::from(i32::from_be_bytes(self.fixed()?))),
            0xd3 => signed(i64::from_be_bytes(self.fixed()?)),
            _ => {
                self.rest = before;
                return Ok(None);
            }
        }))
    }

    /// Reads unsigned integers of at most 32 bits into `out` until it is full, and stops before the first element that is none.
    /// Returns how many were read.
    ///
    /// Token ids are most of what engines send, and their widths alternate at random, so a branch on the marker is mispredicted
    /// every other time. Here the marker picks two shifts and a length from a table instead.
    #[inline]
    pub(crate) fn u32s(&mut self, out: &mut [u32]) -> usize {
        let mut rest = self.rest;
        let mut read = 0;
        for slot in out.iter_mut() {
            let Some(window) = rest.first_chunk::<8>() else { break };
            let form = FORMS[usize::from(window[0])];
            if form.size == 0 {
                break;
            }
            *slot = (u64::from_be_bytes(*window) << form.left >> form.right) as u32;
            rest = &rest[usize::from(form.size)..];
            read += 1;
        }
        self.rest = rest;
        // The last few, which a window of 8 bytes would overshoot.
        for slot in &mut out[read..] {
            let before = self.rest;
            match self.int() {
                Ok(Some(Int::Unsigned(value))) if value <= u64::from(u32::MAX) => *slot = value as u32,
                _ => {
                    self.rest = before;
                    break;
                }
            }
            read += 1;
        }
        read
    }

    /// A number as a float; `None` (and nothing consumed) for another kind.
    pub(crate) fn number(&mut self) -> Result<Option<f64>, Malformed> {
        let before = self.rest;
        match self.byte()? {
            0xca => Ok(Some(f64::from(f32::from_be_bytes(self.fixed()?)))),
            0xcb => Ok(Some(f64::from_be_bytes(self.fixed()?))),
            _ => {
                self.rest = before;
                Ok(self.int()?.map(|int| match int {
                    Int::Unsigned(v) => v as f64,
                    Int::Negative(v) => v as f64,
                }))
            }
        }
    }

    /// Passes over one element with everything in it.
    pub(crate) fn skip(&mut self) -> Result<(), Malformed> {
        // Elements still to pass. Each takes at least a byte, so the loop is bounded by the input.
        let mut pending = 1usize;
        while pending > 0 {
            pending -= 1;
            if let Some(len) = self.array()? {
                pending = pending.saturating_add(len);
            } else if let Some(pairs) = self.map()? {
                pending = pending.saturating_add(pairs * 2);
            } else if pending > self.rest.len() {
                return Err(Malformed);
            } else {
                self.skip_scalar()?;
            }
        }
        Ok(())
    }

    fn skip_scalar(&mut self) -> Result<(), Malformed> {
        let len = match self.byte()? {
            m @ 0xa0..=0xbf => usize::from(m & 0x1f),
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => 0,
            0xcc | 0xd0 => 1,
            0xcd | 0xd1 => 2,
            0xca | 0xce | 0xd2 => 4,
            0xcb | 0xcf | 0xd3 => 8,
            0xc4 | 0xd9 => self.be(1)?,
            0xc5 | 0xda => self.be(2)?,
            0xc6 | 0xdb => self.be(4)?,
            0xc7 => self.be(1)? + 1,
            0xc8 => self.be(2)? + 1,
            0xc9 => self.be(4)?.checked_add(1).ok_or(Malformed)?,
            m @ 0xd4..=0xd8 => (1usize << (m - 0xd4)) + 1,
            // Arrays and maps were taken by the caller; 0xc1 is never used.
            _ => return Err(Malformed),
        };
        self.take(len).map(|_| ())
    }
}

#[cfg(test)]
mod tests;
