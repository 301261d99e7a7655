//! How typed specs map to JSON: what is omitted, what null means, and enumerations that keep unknown values.
//!
//! A spec must parse even when a value is not among those that exist, because validation reports *all* faults
//! with their paths; so enumerations are open, and `null` is the same as absent everywhere.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

/// Whether a value is the same as being absent, and so is left out of JSON.
pub trait Omit {
    /// True when the field should not be written.
    fn omit(&self) -> bool {
        false
    }
}

impl<T> Omit for Option<T> {
    fn omit(&self) -> bool {
        self.is_none()
    }
}
impl<T> Omit for Vec<T> {
    fn omit(&self) -> bool {
        self.is_empty()
    }
}
impl<K, V> Omit for BTreeMap<K, V> {
    fn omit(&self) -> bool {
        self.is_empty()
    }
}
impl Omit for String {
    fn omit(&self) -> bool {
        self.is_empty()
    }
}
impl Omit for bool {
    fn omit(&self) -> bool {
        !self
    }
}
impl Omit for u32 {
    fn omit(&self) -> bool {
        *self == 0
    }
}
impl Omit for i32 {
    fn omit(&self) -> bool {
        *self == 0
    }
}
impl Omit for u64 {
    fn omit(&self) -> bool {
        *self == 0
    }
}
impl Omit for serde_json::Value {
    fn omit(&self) -> bool {
        self.is_null()
    }
}

/// `null` reads as the default, as an absent field does.
pub fn null_as_absent<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// What is read from an object and from nothing else.
pub trait FromObject<'de>: Sized {
    /// Reads the fields.
    fn from_object<A: MapAccess<'de>>(object: A) -> Result<Self, A::Error>;
}

/// Reads an object.
pub fn object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromObject<'de>,
{
    struct Object<T>(PhantomData<T>);

    impl<'de, T: FromObject<'de>> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map")
        }

        fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<T, A::Error> {
            T::from_object(object)
        }
    }

    deserializer.deserialize_map(Object(PhantomData))
}

/// Declares structs of a spec: camelCase, every field may be absent or null, absent values are not written.
#[macro_export]
#[doc(hidden)]
macro_rules! spec_struct {
    ($( $(#[$meta:meta])* pub struct $name:ident { $( $(#[$fmeta:meta])* pub $field:ident : $ty:ty ),* $(,)? } )*) => { $(
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, ::serde::Serialize, ::serde::Deserialize)]
        #[serde(rename_all = "camelCase", default, remote = "Self")]
        #[allow(missing_docs, reason = "the fields carry the names of the API; the struct says what they are for")]
        pub struct $name {
            $(
                $(#[$fmeta])*
                #[serde(skip_serializing_if = "crate::form::Omit::omit", deserialize_with = "crate::form::null_as_absent")]
                pub $field: $ty,
            )*
        }
        impl $crate::form::Omit for $name {}
        $crate::object_form!($name);
    )* };
}

/// Gives a type with a remote form of itself its own form: an object. Without this an array with the fields in
/// their order would do as well.
#[macro_export]
#[doc(hidden)]
macro_rules! object_form {
    ($name:ident $(<$parameter:ident>)?) => {
        impl $(<$parameter: ::serde::Serialize + $crate::form::Omit>)? ::serde::Serialize for $name $(<$parameter>)? {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                Self::serialize(self, serializer)
            }
        }
        impl<'de $(, $parameter: ::serde::de::DeserializeOwned + Default)?> ::serde::Deserialize<'de>
            for $name $(<$parameter>)?
        {
            fn deserialize<D: ::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::form::object(deserializer)
            }
        }
        impl<'de $(, $parameter: ::serde::de::DeserializeOwned + Default)?> $crate::form::FromObject<'de>
            for $name $(<$parameter>)?
        {
            fn from_object<A: ::serde::de::MapAccess<'de>>(object: A) -> Result<Self, A::Error> {
                Self::deserialize(::serde::de::value::MapAccessDeserializer::new(object))
            }
        }
    };
}

/// Declares an enumeration of strings that keeps values it doesn't know, so that validation can name them.
#[macro_export]
#[doc(hidden)]
macro_rules! open_enum {
    ($( $(#[$meta:meta])* pub enum $name:ident { $( $(#[$vmeta:meta])* $variant:ident = $text:literal ),* $(,)? } )*) => { $(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs, reason = "the variants carry the names of the API")]
        pub enum $name {
            $( $(#[$vmeta])* $variant, )*
            /// Anything else, as it was written; never valid.
            Unknown(String),
        }
        impl $name {
            /// Every value that exists, as written.
            pub const KNOWN: &'static [&'static str] = &[$($text),*];

            /// The value as written.
            pub fn as_str(&self) -> &str {
                match self { $( Self::$variant => $text, )* Self::Unknown(text) => text }
            }

            /// Whether it is one of those that exist.
            pub fn is_known(&self) -> bool {
                !matches!(self, Self::Unknown(_))
            }
        }
        impl Default for $name {
            fn default() -> Self {
                Self::Unknown(String::new())
            }
        }
        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                match text { $( $text => Self::$variant, )* other => Self::Unknown(other.to_owned()) }
            }
        }
        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl ::serde::Serialize for $name {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
        impl<'de> ::serde::Deserialize<'de> for $name {
            fn deserialize<D: ::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <::std::borrow::Cow<'de, str> as ::serde::Deserialize>::deserialize(deserializer)?;
                Ok(Self::from(text.as_ref()))
            }
        }
        impl $crate::form::Omit for $name {
            fn omit(&self) -> bool {
                self.as_str().is_empty()
            }
        }
    )* };
}
