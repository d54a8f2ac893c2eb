//! The fields of an event, read from either encoding.
//!
//! All engines share one list of fields, in one order: as an array (`["BlockStored", f1, f2, ...]`; vLLM up to 0.23, SGLang
//! up to 0.5.19) or as a map with a `type` key (vLLM from 0.24, SGLang from 0.5.20, TensorRT-LLM always). Arrays may be
//! shorter or longer than we know, keys come in any order, unknown ones are passed over, and nil means absent. So both are
//! read into one [`Fields`], and only then is it asked what event it was.
//!
//! A field of a wrong type is noted and passed over; it costs the event only if the event cannot do without it.

use super::spare::Spare;
use super::{
    BlockMedia, DropReason, EngineKind, Removed, Stored, WireEvent, sglang, tier_of_medium, trtllm, vllm,
};
use crate::msgpack::{Int, Kind, Malformed, Reader};
use kvlane_index::{EngineHash, GroupId, GroupKind, Tier};
use std::borrow::Cow;

/// What an event's tag says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tag {
    Stored,
    Removed,
    Cleared,
    Unknown,
}

impl Tag {
    fn of(name: &[u8]) -> Self {
        match name {
            b"BlockStored" => Self::Stored,
            b"BlockRemoved" => Self::Removed,
            b"AllBlocksCleared" => Self::Cleared,
            _ => Self::Unknown,
        }
    }
}

/// What a field of the map form is called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Key {
    Type,
    Hashes,
    Parent,
    Tokens,
    BlockSize,
    LoraId,
    Medium,
    LoraName,
    ExtraKeys,
    Group,
    SpecKind,
    Window,
    Locality,
    Salt,
    MmInfos,
    /// None that we know, or no string.
    Other,
}

/// From one list: each key's name, and the key that mostly follows.
macro_rules! keys {
    ($($key:ident $name:literal then $next:ident;)*) => {
        impl Key {
            /// Consumes this key if it is next, in its shortest form.
            #[inline]
            fn is_next(self, reader: &mut Reader<'_>) -> bool {
                match self {
                    $(Self::$key => reader.literal($name),)*
                    Self::Other => false,
                }
            }

            /// Consumes a key of any form, and be it no string.
            fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
                let Some(name) = reader.str_bytes()? else {
                    reader.skip()?;
                    return Ok(Self::Other);
                };
                Ok(match name {
                    $($name => Self::$key,)*
                    _ => Self::Other,
                })
            }

            #[inline]
            fn follower(self) -> Self {
                match self {
                    $(Self::$key => Self::$next,)*
                    Self::Other => Self::Other,
                }
            }
        }
    };
}

keys! {
    Type b"type" then Hashes;
    Hashes b"block_hashes" then Parent;
    Parent b"parent_block_hash" then Tokens;
    Tokens b"token_ids" then BlockSize;
    BlockSize b"block_size" then LoraId;
    LoraId b"lora_id" then Medium;
    Medium b"medium" then LoraName;
    LoraName b"lora_name" then ExtraKeys;
    ExtraKeys b"extra_keys" then Group;
    Group b"group_idx" then SpecKind;
    SpecKind b"kv_cache_spec_kind" then Window;
    Window b"kv_cache_spec_sliding_window" then Locality;
    Locality b"locality" then Salt;
    Salt b"cache_salt" then MmInfos;
    MmInfos b"block_mm_infos" then Other;
}

/// One entry of `extra_keys`: something beside tokens that is part of a block's identity.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum ExtraKey<'a> {
    /// A nameless string: the adapter's name, a cache salt, or (before vLLM 0.19) a media identifier.
    Text(&'a str),
    /// `["cache_salt", s]`.
    Salt(&'a str),
    /// A media item with its offset in the block.
    Item(&'a str, i64),
    /// Anything else, by its bytes: makes the block differ from a plain one.
    Opaque(&'a [u8]),
}

/// Every field that any version has.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    tag: Option<Tag>,
    hashes: Option<Vec<EngineHash>>,
    parent: Option<EngineHash>,
    parent_bad: bool,
    tokens: Option<Vec<u32>>,
    block_size: Option<u32>,
    pub(super) lora_id: Option<i64>,
    medium: Option<&'a [u8]>,
    pub(super) lora_name: Option<&'a str>,
    /// (block, key), in the order of the blocks.
    pub(super) extra_keys: Vec<(u32, ExtraKey<'a>)>,
    group: Option<u16>,
    spec_kind: Option<&'a [u8]>,
    window: Option<u32>,
    remote: bool,
    pub(super) cache_salt: Option<&'a str>,
    mm_infos: Vec<(u32, u64)>,
    /// An identity field (adapter, salt, extra key) could not be read: the blocks must not pass for plain ones.
    identity_bad: bool,
}

impl Fields<'_> {
    const EMPTY: Self = Self {
        tag: None,
        hashes: None,
        parent: None,
        parent_bad: false,
        tokens: None,
        block_size: None,
        lora_id: None,
        medium: None,
        lora_name: None,
        extra_keys: Vec::new(),
        group: None,
        spec_kind: None,
        window: None,
        remote: false,
        cache_salt: None,
        mm_infos: Vec::new(),
        identity_bad: false,
    };
}

/// Reads one event. After an error other than `Malformed` the reader's position is meaningless.
pub(super) fn read_event<'a>(
    engine: EngineKind,
    spare: &mut Spare,
    reader: &mut Reader<'a>,
    unknown_media: &mut u32,
) -> Result<WireEvent<'a>, DropReason> {
    let mut fields = Fields::EMPTY;
    if let Some(len) = reader.array()? {
        read_positional(engine, spare, reader, len, &mut fields)?;
    } else if let Some(pairs) = reader.map()? {
        read_keyed(engine, spare, reader, pairs, &mut fields)?;
    } else {
        return Err(DropReason::UnknownEvent);
    }
    fields.finish(engine, unknown_media)
}

fn read_positional<'a>(
    engine: EngineKind,
    spare: &mut Spare,
    reader: &mut Reader<'a>,
    len: usize,
    fields: &mut Fields<'a>,
) -> Result<(), DropReason> {
    let tag = if len == 0 { None } else { reader.str_bytes()? };
    let tag = Tag::of(tag.ok_or(DropReason::UnknownEvent)?);
    fields.tag = Some(tag);
    for position in 1..len {
        match (tag, position) {
            (Tag::Stored | Tag::Removed, 1) => fields.read_hashes(engine, spare, reader)?,
            (Tag::Stored, 2) => fields.read_parent(engine, reader)?,
            (Tag::Stored, 3) => fields.read_tokens(spare, reader)?,
            (Tag::Stored, 4) => fields.block_size = read_u32(reader)?,
            (Tag::Stored, 5) => fields.lora_id = read_i64(reader)?,
            (Tag::Stored, 6) | (Tag::Removed, 2) => fields.medium = read_bytes(reader)?,
            (Tag::Stored, 7) => fields.lora_name = fields.read_identity(reader)?,
            (Tag::Stored, 8) => fields.read_extra_keys(reader)?,
            (Tag::Stored, 9) | (Tag::Removed, 3) => fields.read_group(reader)?,
            (Tag::Stored, 10) => fields.spec_kind = read_bytes(reader)?,
            (Tag::Stored, 11) => fields.window = read_u32(reader)?,
            _ => reader.skip()?,
        }
    }
    Ok(())
}

fn read_keyed<'a>(
    engine: EngineKind,
    spare: &mut Spare,
    reader: &mut Reader<'a>,
    pairs: usize,
    fields: &mut Fields<'a>,
) -> Result<(), DropReason> {
    // Engines print the keys in one order and leave some out, so the next one is mostly the one that follows.
    let mut expected = Key::Type;
    for _ in 0..pairs {
        let key = if expected.is_next(reader) { expected } else { Key::read(reader)? };
        match key {
            Key::Type => fields.tag = read_bytes(reader)?.map(Tag::of),
            Key::Hashes => fields.read_hashes(engine, spare, reader)?,
            Key::Parent => fields.read_parent(engine, reader)?,
            Key::Tokens => fields.read_tokens(spare, reader)?,
            Key::BlockSize => fields.block_size = read_u32(reader)?,
            Key::LoraId => fields.lora_id = read_i64(reader)?,
            Key::Medium => fields.medium = read_bytes(reader)?,
            Key::LoraName => fields.lora_name = fields.read_identity(reader)?,
            Key::ExtraKeys => fields.read_extra_keys(reader)?,
            Key::Group => fields.read_group(reader)?,
            Key::SpecKind => fields.spec_kind = read_bytes(reader)?,
            Key::Window => fields.window = read_u32(reader)?,
            Key::Locality => {
                fields.remote = read_bytes(reader)?.is_some_and(|l| l.eq_ignore_ascii_case(b"REMOTE"));
            }
            Key::Salt => fields.cache_salt = fields.read_identity(reader)?,
            Key::MmInfos => fields.read_mm_infos(reader)?,
            Key::Other => {
                reader.skip()?;
                continue;
            }
        }
        expected = key.follower();
    }
    Ok(())
}

impl<'a> Fields<'a> {
    fn read_hashes(
        &mut self,
        engine: EngineKind,
        spare: &mut Spare,
        reader: &mut Reader<'a>,
    ) -> Result<(), Malformed> {
        let Some(len) = reader.array()? else { return reader.skip() };
        let mut hashes = spare.hashes();
        hashes.reserve_exact(len);
        let mut bad = false;
        for _ in 0..len {
            match read_hash(engine, reader)? {
                Some(hash) => hashes.push(hash),
                None => bad = true,
            }
        }
        self.hashes = (!bad).then_some(hashes);
        Ok(())
    }

    fn read_parent(&mut self, engine: EngineKind, reader: &mut Reader<'a>) -> Result<(), Malformed> {
        self.parent = None;
        self.parent_bad = false;
        if !reader.nil() {
            self.parent = read_hash(engine, reader)?;
            self.parent_bad = self.parent.is_none();
        }
        Ok(())
    }

    fn read_tokens(&mut self, spare: &mut Spare, reader: &mut Reader<'a>) -> Result<(), Malformed> {
        let Some(len) = reader.array()? else { return reader.skip() };
        let mut tokens = spare.tokens();
        tokens.resize(len, 0);
        let mut read = 0;
        loop {
            read += reader.u32s(&mut tokens[read..]);
            if read == len {
                break;
            }
            // Of another form: a wide integer of a small value, an EAGLE pair, or no token at all.
            let token = match reader.int()? {
                Some(Int::Unsigned(token)) => u32::try_from(token).ok(),
                Some(Int::Negative(_)) => None,
                None => read_pair(reader)?,
            };
            let Some(token) = token else {
                // A digest or a negative placeholder: the blocks have no place in a prompt.
                for _ in read + 1..len {
                    reader.skip()?;
                }
                self.tokens = None;
                return Ok(());
            };
            tokens[read] = token;
            read += 1;
        }
        self.tokens = Some(tokens);
        Ok(())
    }

    fn read_group(&mut self, reader: &mut Reader<'a>) -> Result<(), Malformed> {
        self.group = read_u32(reader)?.and_then(|g| u16::try_from(g).ok());
        Ok(())
    }

    fn read_identity(&mut self, reader: &mut Reader<'a>) -> Result<Option<&'a str>, Malformed> {
        if reader.nil() {
            return Ok(None);
        }
        let text = read_str(reader)?;
        self.identity_bad |= text.is_none();
        Ok(text)
    }

    fn read_extra_keys(&mut self, reader: &mut Reader<'a>) -> Result<(), Malformed> {
        self.extra_keys.clear();
        if reader.nil() {
            return Ok(());
        }
        let Some(blocks) = reader.array()? else {
            self.identity_bad = true;
            return reader.skip();
        };
        for block in 0..blocks {
            let block = u32::try_from(block).unwrap_or(u32::MAX);
            let start = *reader;
            if reader.nil() {
                continue;
            }
            let Some(keys) = reader.array()? else {
                reader.skip()?;
                self.extra_keys.push((block, ExtraKey::Opaque(reader.since(&start))));
                continue;
            };
            for _ in 0..keys {
                let key = read_extra_key(reader)?;
                self.extra_keys.push((block, key));
            }
        }
        Ok(())
    }

    /// `[nil | {"mm_objects": [{"mm_hash": int, "offsets": [...]}]}]`, one entry for each block.
    fn read_mm_infos(&mut self, reader: &mut Reader<'a>) -> Result<(), Malformed> {
        self.mm_infos.clear();
        let Some(blocks) = reader.array()? else { return reader.skip() };
        for block in 0..blocks {
            let block = u32::try_from(block).unwrap_or(u32::MAX);
            let Some(pairs) = reader.map()? else {
                reader.skip()?;
                continue;
            };
            for _ in 0..pairs {
                if reader.str_bytes()? != Some(b"mm_objects") {
                    reader.skip()?;
                    continue;
                }
                let Some(objects) = reader.array()? else {
                    reader.skip()?;
                    continue;
                };
                for _ in 0..objects {
                    let Some(pairs) = reader.map()? else {
                        reader.skip()?;
                        continue;
                    };
                    for _ in 0..pairs {
                        let is_hash = reader.str_bytes()? == Some(b"mm_hash");
                        match reader.int()? {
                            Some(hash) if is_hash => self.mm_infos.push((block, hash.bits())),
                            Some(_) => {}
                            None => reader.skip()?,
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn finish(mut self, engine: EngineKind, unknown_media: &mut u32) -> Result<WireEvent<'a>, DropReason> {
        let tag = self.tag.unwrap_or(Tag::Unknown);
        if tag == Tag::Unknown {
            return Err(DropReason::UnknownEvent);
        }
        if tag == Tag::Cleared {
            return Ok(WireEvent::Cleared);
        }
        let tier = match self.medium {
            _ if self.remote => Tier::External,
            None | Some(b"GPU") => Tier::Device,
            // A name that is no text says nothing.
            Some(medium) => {
                std::str::from_utf8(medium).map_or(Some(Tier::Device), tier_of_medium).unwrap_or_else(|| {
                    *unknown_media += 1;
                    Tier::External
                })
            }
        };
        let group = GroupId(self.group.unwrap_or(0));
        if tag == Tag::Removed {
            let hashes = self.hashes.ok_or(DropReason::BadRemoval)?;
            return Ok(WireEvent::Removed(Removed { hashes, tier, group }));
        }
        if self.parent_bad || self.identity_bad {
            return Err(DropReason::BadField);
        }
        let group_kind = self.group_kind()?;
        let identity = match engine {
            EngineKind::Vllm => vllm::identity(&self),
            EngineKind::Sglang => sglang::identity(&self),
            EngineKind::TrtLlm => trtllm::identity(&self),
        };
        let mut media = identity.media;
        if !self.mm_infos.is_empty() {
            media.extend(self.mm_infos.iter().map(|&(block, hash)| BlockMedia {
                block,
                offset: 0,
                identifier: Cow::Owned(format!("{hash:016x}")),
            }));
        }
        media.sort_by_key(|m| m.block);
        Ok(WireEvent::Stored(Stored {
            hashes: self.hashes.take().ok_or(DropReason::BadField)?,
            parent: self.parent,
            tokens: self.tokens.take().ok_or(DropReason::BadField)?,
            block_size: self.block_size.unwrap_or(0),
            tier,
            group,
            group_kind,
            adapter: identity.adapter,
            salt: identity.salt,
            media,
        }))
    }

    /// The first block of the event is the first of a prompt.
    pub(super) fn at_root(&self) -> bool {
        self.parent.is_none()
    }

    fn group_kind(&self) -> Result<Option<GroupKind>, DropReason> {
        let Some(kind) = self.spec_kind else { return Ok(None) };
        Ok(match kind {
            b"full_attention" | b"mla_attention" | b"sink_full_attention" => Some(GroupKind::Full),
            // A chunk's start lies at most its length before the end of a hit; the event does not say the length of a
            // chunk (vLLM 0.32 leaves the window out), and then the window is unknown.
            b"sliding_window" | b"sliding_window_mla" | b"chunked_local_attention" => {
                Some(GroupKind::Sliding { window_tokens: self.window.unwrap_or(u32::MAX) })
            }
            b"mamba" => Some(GroupKind::Recurrent),
            b"encoder_only_attention" | b"cross_attention" => return Err(DropReason::IgnoredGroup),
            _ => None,
        })
    }
}

/// What an event's identity fields come to.
#[derive(Default)]
pub(super) struct Identity<'a> {
    pub(super) adapter: Option<Cow<'a, str>>,
    pub(super) salt: Option<Cow<'a, str>>,
    pub(super) media: Vec<BlockMedia<'a>>,
}

/// A hash of any encoding; `None` for an element that cannot be one.
#[inline]
fn read_hash(engine: EngineKind, reader: &mut Reader<'_>) -> Result<Option<EngineHash>, Malformed> {
    if let Some(hash) = reader.wide() {
        return Ok(Some(EngineHash(hash)));
    }
    read_odd_hash(engine, reader)
}

#[cold]
fn read_odd_hash(engine: EngineKind, reader: &mut Reader<'_>) -> Result<Option<EngineHash>, Malformed> {
    if let Some(int) = reader.int()? {
        return Ok(Some(EngineHash(int.bits())));
    }
    if let Some(bytes) = reader.bin()? {
        return Ok(Some(cut_digest(engine, bytes)));
    }
    if let Some(text) = reader.str_bytes()? {
        return Ok(Some(hash_of_text(engine, text)));
    }
    reader.skip()?;
    Ok(None)
}

/// A digest cut to 64 bits, the same way in which its engine cuts it for the integer form: vLLM (and TensorRT-LLM) keep
/// the last 8 bytes, SGLang the first 8, big-endian. A shorter one is its value.
pub(super) fn cut_digest(engine: EngineKind, bytes: &[u8]) -> EngineHash {
    let eight = match engine {
        EngineKind::Sglang => &bytes[..bytes.len().min(8)],
        EngineKind::Vllm | EngineKind::TrtLlm => &bytes[bytes.len().saturating_sub(8)..],
    };
    EngineHash(eight.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

/// A hash printed as text: 16, 32, 40, 64 or 128 hexadecimal digits are the digest's bytes, a decimal number is its value; any
/// other string is hashed (XXH3-64).
pub(super) fn hash_of_text(engine: EngineKind, text: &[u8]) -> EngineHash {
    let hex = text.strip_prefix(b"0x").unwrap_or(text);
    if matches!(hex.len(), 16 | 32 | 40 | 64 | 128) && hex.iter().all(u8::is_ascii_hexdigit) {
        let digit = |c: u8| (c as char).to_digit(16).map_or(0, |d| d as u8);
        let mut bytes = [0u8; 64];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = digit(pair[0]) << 4 | digit(pair[1]);
        }
        return cut_digest(engine, &bytes[..hex.len() / 2]);
    }
    let decimal = std::str::from_utf8(text).ok();
    if let Some(value) = decimal.and_then(|t| t.parse::<u64>().ok()) {
        return EngineHash(value);
    }
    if let Some(value) = decimal.and_then(|t| t.parse::<i64>().ok()) {
        return EngineHash(value as u64);
    }
    EngineHash(xxhash_rust::xxh3::xxh3_64(text))
}

/// The first token of an EAGLE pair; `None` for anything else.
fn read_pair(reader: &mut Reader<'_>) -> Result<Option<u32>, Malformed> {
    let Some(len) = reader.array()? else {
        reader.skip()?;
        return Ok(None);
    };
    let mut first = None;
    for i in 0..len {
        match reader.int()? {
            Some(Int::Unsigned(token)) if i == 0 => first = u32::try_from(token).ok(),
            Some(_) => {}
            None => reader.skip()?,
        }
    }
    Ok(first.filter(|_| len == 2))
}

fn read_extra_key<'a>(reader: &mut Reader<'a>) -> Result<ExtraKey<'a>, Malformed> {
    let start = *reader;
    if reader.peek()? == Kind::Str {
        let text = reader.str_bytes()?.and_then(|b| std::str::from_utf8(b).ok());
        return Ok(text.map_or(ExtraKey::Opaque(reader.since(&start)), ExtraKey::Text));
    }
    let mut inside = *reader;
    reader.skip()?;
    let opaque = ExtraKey::Opaque(reader.since(&start));
    let Some(len) = inside.array()? else { return Ok(opaque) };
    // Published untagged up to 0.32; the tagged forms that the block hash uses are read as well.
    let mut text = || inside.str_bytes().ok().flatten().and_then(|b| std::str::from_utf8(b).ok());
    let Some(first) = (len >= 2).then(&mut text).flatten() else { return Ok(opaque) };
    let second = text();
    Ok(match (len, first, second) {
        (2, "cache_salt", Some(salt)) => ExtraKey::Salt(salt),
        (2, "lora", Some(name)) | (3, "lora", Some(name)) => ExtraKey::Text(name),
        (3, "mm", Some(identifier)) => match read_i64(&mut inside)? {
            Some(offset) => ExtraKey::Item(identifier, offset),
            None => opaque,
        },
        (2, identifier, None) => match read_i64(&mut inside)? {
            Some(offset) => ExtraKey::Item(identifier, offset),
            None => opaque,
        },
        _ => opaque,
    })
}

fn read_u32(reader: &mut Reader<'_>) -> Result<Option<u32>, Malformed> {
    if reader.nil() {
        return Ok(None);
    }
    match reader.int()? {
        Some(Int::Unsigned(v)) => Ok(u32::try_from(v).ok()),
        Some(Int::Negative(_)) => Ok(None),
        None => reader.skip().map(|()| None),
    }
}

fn read_i64(reader: &mut Reader<'_>) -> Result<Option<i64>, Malformed> {
    if reader.nil() {
        return Ok(None);
    }
    match reader.int()? {
        Some(Int::Unsigned(v)) => Ok(i64::try_from(v).ok()),
        Some(Int::Negative(v)) => Ok(Some(v)),
        None => reader.skip().map(|()| None),
    }
}

fn read_bytes<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a [u8]>, Malformed> {
    match reader.str_bytes()? {
        Some(bytes) => Ok(Some(bytes)),
        None => reader.skip().map(|()| None),
    }
}

fn read_str<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a str>, Malformed> {
    Ok(read_bytes(reader)?.and_then(|b| std::str::from_utf8(b).ok()))
}
