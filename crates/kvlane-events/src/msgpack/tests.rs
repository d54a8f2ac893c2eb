//! The reader against encodings made on purpose, and against every truncation of them.

use super::*;

/// Every form that MessagePack has for an unsigned integer of at most 32 bits, and some that it has for others.
fn forms(value: u32) -> Vec<Vec<u8>> {
    let mut forms = vec![
        [&[0xce], &value.to_be_bytes()[..]].concat(),
        [&[0xcf], &u64::from(value).to_be_bytes()[..]].concat(),
        [&[0xd3], &i64::from(value).to_be_bytes()[..]].concat(),
    ];
    if let Ok(short) = u16::try_from(value) {
        forms.push([&[0xcd], &short.to_be_bytes()[..]].concat());
    }
    if let Ok(byte) = u8::try_from(value) {
        forms.push(vec![0xcc, byte]);
    }
    if value < 128 {
        forms.push(vec![value as u8]);
    }
    forms
}

#[test]
fn u32s_reads_what_int_reads() {
    let mut seed = 1u64;
    let mut next = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % below
    };
    for _ in 0..2_000 {
        let values: Vec<u32> = (0..next(40)).map(|_| (next(1 << 31) >> next(31)) as u32).collect();
        let mut bytes = Vec::new();
        for &value in &values {
            let forms = forms(value);
            bytes.extend_from_slice(&forms[next(forms.len())]);
        }
        bytes.truncate(bytes.len() - next(bytes.len().min(3) + 1));
        let (mut fast, mut slow) = (Reader::new(&bytes), Reader::new(&bytes));
        let (mut tokens, mut read) = (vec![0; values.len()], 0);
        // As the decoder does: one by one where the fast way stops.
        loop {
            read += fast.u32s(&mut tokens[read..]);
            if read == values.len() {
                break;
            }
            match fast.int() {
                Ok(Some(Int::Unsigned(value))) => tokens[read] = value as u32,
                _ => break,
            }
            read += 1;
        }
        let mut expected = Vec::new();
        while let Ok(Some(Int::Unsigned(value))) = slow.int() {
            expected.push(value as u32);
        }
        assert_eq!(tokens[..read], expected, "{bytes:02x?}");
    }
}

#[test]
fn a_literal_is_consumed_only_if_it_is_all_there() {
    let mut reader = Reader::new(b"\xa4type\xa4typ");
    assert!(!reader.literal(b"types") && reader.literal(b"type") && !reader.literal(b"type"));
    assert_eq!(reader.rest, b"\xa4typ");
    assert!(!Reader::new(b"\xd9\x04type").literal(b"type"), "only in its shortest form");
}

#[test]
fn a_length_is_never_believed_beyond_the_bytes_that_are_there() {
    for bytes in [&[0xdd, 0xff, 0xff, 0xff, 0xff, 0][..], &[0xdc, 0xff, 0xff], &[0xdf, 0, 1, 0, 0], &[0x9f]] {
        assert!(matches!(Reader::new(bytes).array(), Err(Malformed) | Ok(None)));
        assert!(Reader::new(bytes).skip().is_err());
    }
    for bytes in
        [&[0xdb, 0xff, 0xff, 0xff, 0xff][..], &[0xc6, 0, 0, 0, 1], &[0xc9, 0xff, 0xff, 0xff, 0xff, 0]]
    {
        assert!(Reader::new(bytes).skip().is_err());
    }
}

#[test]
fn nesting_of_any_depth_is_passed_over_without_recursion() {
    let mut bytes = vec![0x91; 1 << 20];
    bytes.push(0);
    let mut reader = Reader::new(&bytes);
    assert!(reader.skip().is_ok());
    assert!(reader.peek().is_err());
}

#[test]
fn skip_passes_over_one_element_of_any_kind() {
    let elements: [&[u8]; 17] = [
        &[0x05],
        &[0xff],
        &[0xc0],
        &[0xc3],
        &[0xcc, 1],
        &[0xd1, 1, 2],
        &[0xca, 1, 2, 3, 4],
        &[0xcb, 1, 2, 3, 4, 5, 6, 7, 8],
        &[0xa2, b'a', b'b'],
        &[0xd9, 1, b'a'],
        &[0xc4, 2, 1, 2],
        &[0xd4, 7, 1],
        &[0xd8, 7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
        &[0xc7, 1, 7, 9],
        &[0x92, 1, 0x91, 2],
        &[0x81, 1, 2],
        &[0xde, 0, 1, 0xa1, b'k', 0x90],
    ];
    for element in elements {
        let mut reader = Reader::new(element);
        assert!(reader.skip().is_ok() && reader.peek().is_err(), "{element:02x?}");
        for cut in 0..element.len() {
            assert!(Reader::new(&element[..cut]).skip().is_err(), "{element:02x?} cut to {cut}");
        }
    }
}

#[test]
fn integers_of_any_width_and_sign_have_one_bit_pattern() {
    let minus_one: [&[u8]; 6] = [
        &[0xff],
        &[0xd0, 0xff],
        &[0xd1, 0xff, 0xff],
        &[0xd2, 0xff, 0xff, 0xff, 0xff],
        &[0xd3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        &[0xcf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    ];
    for bytes in minus_one {
        assert_eq!(Reader::new(bytes).int().unwrap().unwrap().bits(), u64::MAX, "{bytes:02x?}");
    }
}
