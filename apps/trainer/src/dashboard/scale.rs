//! Where values stand in a plot, and how they are written.

/// Where a value stands between the bottom (0) and the top (1) of a plot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// In proportion.
    Linear {
        /// The bottom.
        low: f64,
        /// The top.
        high: f64,
    },
    /// The same with logarithms.
    Log {
        /// Logarithm of the bottom.
        low: f64,
        /// Logarithm of the top.
        high: f64,
    },
}

impl Scale {
    /// Above this ratio of its ends, a linear plot would show little but its largest values.
    const LARGEST_LINEAR: f64 = 50.0;

    /// The scale for values from `low` to `high`.
    pub fn new(low: f64, high: f64) -> Self {
        if low > 0.0 && high > Self::LARGEST_LINEAR * low {
            let (low, high) = (low.ln(), high.ln());
            return Self::Log { low, high };
        }
        Self::linear(low, high)
    }

    /// The same, never with logarithms.
    pub fn linear(low: f64, high: f64) -> Self {
        match low < high {
            true => Self::Linear { low, high },
            // a level line, in the middle
            false if low.is_finite() && low != 0.0 => {
                let half = low.abs() / 2.0;
                let (low, high) = (low - half, low + half);
                Self::Linear { low, high }
            }
            false => Self::Linear {
                low: -1.0,
                high: 1.0,
            },
        }
    }

    /// Where a value stands.
    pub fn place(&self, value: f64) -> f64 {
        match self {
            Self::Linear { low, high } => (value - low) / (high - low),
            Self::Log { low, high } => (value.ln() - low) / (high - low),
        }
    }

    /// What stands there.
    pub fn value(&self, place: f64) -> f64 {
        match self {
            Self::Linear { low, high } => low + place * (high - low),
            Self::Log { low, high } => (low + place * (high - low)).exp(),
        }
    }
}

/// Four significant digits, small numbers with an exponent.
pub fn number(value: f64) -> String {
    match value.abs() {
        x if x != 0.0 && x < 1e-2 => format!("{value:.3e}"),
        x if x >= 1000.0 => format!("{value:.0}"),
        x if x >= 100.0 => format!("{value:.1}"),
        _ => format!("{value:.4}"),
    }
}

/// Bytes in MiB or GiB.
pub fn bytes(value: f64) -> String {
    let mib = value / f64::from(1 << 20);
    match mib < 1024.0 {
        true => format!("{mib:.0} MiB"),
        false => format!("{:.2} GiB", mib / 1024.0),
    }
}

/// Numbers with so many digits behind the point, all with an exponent if the largest is small.
pub fn numbers_in<const N: usize>(values: [f64; N], digits: usize) -> [String; N] {
    let largest = values
        .iter()
        .fold(0.0, |most: f64, value| most.max(value.abs()));
    values.map(|value| match largest < 1e-2 {
        true => format!("{value:.digits$e}"),
        false => format!("{value:.digits$}"),
    })
}

/// Bytes with so many digits behind the point.
pub fn bytes_in<const N: usize>(values: [f64; N], digits: usize) -> [String; N] {
    let largest = values
        .iter()
        .fold(0.0, |most: f64, value| most.max(value.abs()));
    let (unit, name) = match largest < f64::from(1 << 30) {
        true => (f64::from(1 << 20), "MiB"),
        false => (f64::from(1 << 30), "GiB"),
    };
    values.map(|value| format!("{:.digits$} {name}", value / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_values_are_seen_beside_large_ones() {
        let plain = Scale::new(1.0, 3.0);
        assert_eq!([1.0, 2.0, 3.0].map(|y| plain.place(y)), [0.0, 0.5, 1.0]);
        let wide = Scale::new(1e-3, 10.0);
        for (value, place) in [(1e-3, 0.0), (0.1, 0.5), (10.0, 1.0)] {
            assert!((wide.place(value) - place).abs() < 1e-12);
            assert!((wide.value(place) - value).abs() < 1e-12 * value);
        }
        // nothing to take a logarithm of, and level lines
        assert_eq!(Scale::new(0.0, 10.0).place(5.0), 0.5);
        for level in [2e-4, 0.0, -3.0] {
            assert!((Scale::new(level, level).place(level) - 0.5).abs() < 1e-12);
        }
        let nothing = Scale::new(f64::INFINITY, f64::NEG_INFINITY);
        assert!(nothing.value(0.5).is_finite());
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [2e-4, 0.0, 1.25, 321.26, 12345.6].map(number);
        assert_eq!(numbers, ["2.000e-4", "0.0000", "1.2500", "321.3", "12346"]);
        assert_eq!(bytes(400.0 * f64::from(1 << 20)), "400 MiB");
        assert_eq!(bytes(1.5 * f64::from(1 << 30)), "1.50 GiB");
    }
}
