//! What a link is for.

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Carries the filters, and messages from the broker.
    Data,
    /// Carries clients' publishes to the broker.
    Publish,
    /// Fetches retained messages.
    Retained,
    /// Carries shared subscriptions.
    Shared,
}

impl Role {
    /// The word in logs and the admin API.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Publish => "publish",
            Self::Retained => "retained",
            Self::Shared => "shared",
        }
    }

    /// The letter in link names and client identifiers.
    pub(crate) const fn letter(self) -> char {
        match self {
            Self::Data => 'd',
            Self::Publish => 'p',
            Self::Retained => 'r',
            Self::Shared => 's',
        }
    }

    /// The name of a link of this role: the role's letter and the number.
    pub(crate) fn link_name(self, number: usize) -> String {
        format!("{}{number}", self.letter())
    }

    /// Whether links of this role carry filters that were placed on them.
    pub(crate) const fn has_filters(self) -> bool {
        matches!(self, Self::Data | Self::Shared)
    }
}
