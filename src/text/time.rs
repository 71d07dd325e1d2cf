//! The date for templates that ask for it: `strftime_now`, in UTC.

use chrono::format::StrftimeItems;
use chrono::{DateTime, Utc};

/// Now, in a form of C's `strftime`.
pub fn strftime_now(form: &str) -> String {
    strftime(form, DateTime::from(std::time::SystemTime::now()))
}

/// A time; codes that are not known stay as they are written.
fn strftime(form: &str, time: DateTime<Utc>) -> String {
    time.format_with_items(StrftimeItems::new_lenient(form)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strftime(form: &str, seconds: i64) -> String {
        super::strftime(form, DateTime::from_timestamp_secs(seconds).expect("a time"))
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let form = "%Y-%m-%d %H:%M:%S %a %j";
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 Thu 001"),
            (951_782_400, "2000-02-29 00:00:00 Tue 060"),
            (1_704_067_199, "2023-12-31 23:59:59 Sun 365"),
            (1_735_603_200, "2024-12-31 00:00:00 Tue 366"),
            (4_107_542_400, "2100-03-01 00:00:00 Mon 060"),
        ] {
            assert_eq!(strftime(form, seconds), text);
        }
        assert_eq!(
            strftime("%d %b %Y, %-d %B, %A %-I %p %y%%%Q %", 1_709_500_000),
            "03 Mar 2024, 3 March, Sunday 9 PM 24%%Q %"
        );
    }
}
