//! Where a block lies: the engines' `medium`, ordered from the fastest.

/// A storage tier of one worker. Ordered: `Device < Host < Disk < External`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Tier {
    /// The memory that the engine computes in (a CPU engine's main memory counts as this).
    Device,
    /// Host memory next to the device.
    Host,
    /// Local disk.
    Disk,
    /// Storage reached over a network.
    External,
}

impl Tier {
    /// All tiers, fastest first.
    pub const ALL: [Self; 4] = [Self::Device, Self::Host, Self::Disk, Self::External];

    /// The name used in JSON and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
            Self::External => "external",
        }
    }
}
