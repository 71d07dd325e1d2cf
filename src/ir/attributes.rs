//! Attributes of operators in the text form.

use std::fmt;

/// The value of an attribute in the text form.
#[derive(Clone, PartialEq, Debug)]
pub enum Attribute {
    /// A whole number.
    Int(u64),
    /// A decimal number.
    Float(f64),
    /// A list of whole numbers.
    Ints(Vec<u64>),
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attribute::Int(n) => write!(f, "{n}"),
            Attribute::Float(x) => write!(f, "{x:?}"),
            Attribute::Ints(list) => {
                f.write_str("[")?;
                for (i, n) in list.iter().enumerate() {
                    write!(f, "{}{n}", if i > 0 { ", " } else { "" })?;
                }
                f.write_str("]")
            }
        }
    }
}

/// Takes attributes by name and type; what is left over in the end is unknown.
pub(super) struct AttributeReader<'a> {
    pub(super) mnemonic: &'a str,
    pub(super) rest: Vec<(String, Attribute)>,
}

impl AttributeReader<'_> {
    fn take(&mut self, name: &str) -> Option<Attribute> {
        let at = self.rest.iter().position(|(n, _)| n == name)?;
        Some(self.rest.remove(at).1)
    }

    fn missing(&self, name: &str) -> String {
        format!("`{}` needs the attribute `{name}`", self.mnemonic)
    }

    fn mistyped(&self, name: &str, expected: &str, found: &Attribute) -> String {
        format!("attribute `{name}` of `{}`: expected {expected}, found {found}", self.mnemonic)
    }

    pub(super) fn int(&mut self, name: &str) -> Result<u64, String> {
        self.optional_int(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn optional_int(&mut self, name: &str) -> Result<Option<u64>, String> {
        match self.take(name) {
            None => Ok(None),
            Some(Attribute::Int(n)) => Ok(Some(n)),
            Some(other) => Err(self.mistyped(name, "a whole number", &other)),
        }
    }

    pub(super) fn float(&mut self, name: &str) -> Result<f64, String> {
        match self.take(name).ok_or_else(|| self.missing(name))? {
            Attribute::Float(x) => Ok(x),
            other => Err(self.mistyped(name, "a decimal number", &other)),
        }
    }

    pub(super) fn ints(&mut self, name: &str) -> Result<Vec<u64>, String> {
        self.optional_ints(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn optional_ints(&mut self, name: &str) -> Result<Option<Vec<u64>>, String> {
        match self.take(name) {
            None => Ok(None),
            Some(Attribute::Ints(list)) => Ok(Some(list)),
            Some(other) => Err(self.mistyped(name, "a list of whole numbers", &other)),
        }
    }
}
