//! A part of a backup's data, chosen by chance.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How much of a backup's data a verification reads, in percent: 1 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Sample(u8);

/// Says that a number or a text is no sample.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no sample: write a whole number of percent from 1 to 100, such as 5%")]
pub struct InvalidSample(String);

impl Sample {
    /// The number of percent.
    pub fn percent(self) -> u8 {
        self.0
    }

    /// Whether the piece of that index is one of the sample. Another `seed` makes another choice; a backup's first piece
    /// always is one, so that a sample is never empty.
    pub fn takes(self, seed: u64, index: u64) -> bool {
        // The finisher of SplitMix64 (Steele, Lea and Flood, 2014), which spreads neighbours over all numbers.
        let mut mixed = seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        index == 0 || (mixed ^ (mixed >> 31)) % 100 < self.0.into()
    }
}

impl TryFrom<u8> for Sample {
    type Error = InvalidSample;

    fn try_from(percent: u8) -> Result<Self, InvalidSample> {
        if (1..=100).contains(&percent) { Ok(Self(percent)) } else { Err(InvalidSample(percent.to_string())) }
    }
}

impl From<Sample> for u8 {
    fn from(sample: Sample) -> Self {
        sample.0
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl FromStr for Sample {
    type Err = InvalidSample;

    /// Takes `5` and `5%`.
    fn from_str(text: &str) -> Result<Self, InvalidSample> {
        let invalid = || InvalidSample(text.chars().take(40).collect());
        let number: u8 = text.strip_suffix('%').unwrap_or(text).parse().map_err(|_| invalid())?;
        Self::try_from(number).map_err(|_| invalid())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_a_whole_number_of_percent() {
        for (text, percent) in [("1", 1), ("5%", 5), ("100%", 100)] {
            assert_eq!(text.parse::<Sample>().unwrap().percent(), percent);
        }
        for text in ["", "%", "0", "0%", "101", "300", "5.5%", "-5", "5 %", "5%%"] {
            assert_eq!(text.parse::<Sample>(), Err(InvalidSample(text.into())));
        }
    }

    #[test]
    fn a_sample_is_as_large_as_it_says_and_another_one_each_time() {
        for percent in [1, 5, 50, 100] {
            let sample = Sample(percent);
            let taken = |seed| (0..100_000).filter(|index| sample.takes(seed, *index)).collect::<Vec<u64>>();
            let (one, other) = (taken(1), taken(2));
            let expected = usize::from(percent) * 1000;
            assert!(one.len().abs_diff(expected) <= expected / 10 + 1, "{percent}: {}", one.len());
            assert_eq!(one == other, percent == 100, "{percent}");
            assert_eq!((one[0], other[0]), (0, 0), "{percent}");
        }
    }
}
