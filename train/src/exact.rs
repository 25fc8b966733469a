//! Numbers that come back from JSON as they were: serde_json may read the last digit of a float
//! differently, so they are written as text.

use serde::{Deserialize, Deserializer, Serializer, de::Error};

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Text(String),
    Number(f64), // as earlier versions wrote it
}

impl Written {
    fn value<E: Error>(self) -> Result<f64, E> {
        match self {
            Self::Text(text) => text.parse().map_err(E::custom),
            Self::Number(number) => Ok(number),
        }
    }
}

/// Writes a number.
pub fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&number.to_string())
}

/// Reads a number.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Written::deserialize(deserializer)?.value()
}

/// The same for a number that may be missing.
pub mod option {
    use super::*;

    /// Writes a number, or null.
    pub fn serialize<S: Serializer>(
        number: &Option<f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match number {
            Some(number) => super::serialize(number, serializer),
            None => serializer.serialize_none(),
        }
    }

    /// Reads a number, or null.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<f64>, D::Error> {
        let written: Option<Written> = Option::deserialize(deserializer)?;
        written.map(Written::value).transpose()
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Pair {
        #[serde(with = "super")]
        one: f64,
        #[serde(with = "super::option")]
        other: Option<f64>,
    }

    #[test]
    fn every_bit_of_a_number_comes_back() {
        let mut bits = 0x3ff1_2345_6789_abcd_u64;
        for _ in 0..2000 {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let number = f64::from_bits(bits >> 2); // positive, and finite
            let pair = Pair {
                one: number,
                other: Some(-number),
            };
            let json = serde_json::to_string(&pair).unwrap();
            assert_eq!(serde_json::from_str::<Pair>(&json).unwrap(), pair);
        }
        let old: Pair = serde_json::from_str(r#"{"one": 2.5, "other": null}"#).unwrap();
        let expected = Pair {
            one: 2.5,
            other: None,
        };
        assert_eq!(old, expected);
    }
}
