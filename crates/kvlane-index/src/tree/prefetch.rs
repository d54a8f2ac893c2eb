//! Tells the processor what will be needed soon.
//!
//! The writer knows all names of an event before it needs the first one's bucket. Asking for all the buckets first makes their loads overlap; plain loads
//! do so too, but each holds its place in the processor's window until it is there.

/// Asks for the cache line of `at`.
#[inline]
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "a hint without a safe form"))]
pub(super) fn prefetch<T>(at: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; a prefetch reads nothing that the program could see, and `at` is valid anyway.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
