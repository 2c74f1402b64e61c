//! Generic netlink: the family `netdev` of kernel 6.3 and later, which says what interfaces can do for XDP.

use std::io;

use anyhow::{Context, Result};
use netlink_packet_core::{
    DecodeError, Emitable, NlasIterator, ParseableParametrized, parse_u32, parse_u64,
};
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{
        GenlCtrl, GenlCtrlCmd,
        nlas::{GenlCtrlAttrs, McastGrpAttrs},
    },
};
use netlink_sys::protocols::NETLINK_GENERIC;

use super::Requester;

const FAMILY: &str = "netdev";
/// Its multicast group that tells changes.
const GROUP: &str = "mgmt";
const COMMAND_DEV_GET: u8 = 1;
const VERSION: u8 = 1;
const ATTRIBUTE_IFINDEX: u16 = 1;
const ATTRIBUTE_XDP_FEATURES: u16 = 3;

/// What an interface can do for XDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpFeatures {
    /// Kernel index of the interface.
    pub ifindex: u32,
    /// Bits of `enum netdev_xdp_act`.
    pub bits: u64,
}

/// The family's numbers, which every kernel gives out anew.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    id: u16,
    /// Number of the multicast group that tells changes.
    pub group: Option<u32>,
}

#[derive(Clone, Debug)]
enum DevMessage {
    Get,
    Features(XdpFeatures),
}

impl GenlFamily for DevMessage {
    fn family_name() -> &'static str {
        FAMILY
    }

    fn command(&self) -> u8 {
        COMMAND_DEV_GET
    }

    fn version(&self) -> u8 {
        VERSION
    }
}

impl Emitable for DevMessage {
    fn buffer_len(&self) -> usize {
        0
    }

    fn emit(&self, _: &mut [u8]) {}
}

impl ParseableParametrized<[u8], GenlHeader> for DevMessage {
    fn parse_with_param(bytes: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        let mut features = XdpFeatures::default();
        for attribute in NlasIterator::new(bytes) {
            let attribute = attribute?;
            match attribute.kind() {
                ATTRIBUTE_IFINDEX => features.ifindex = parse_u32(attribute.value())?,
                ATTRIBUTE_XDP_FEATURES => features.bits = parse_u64(attribute.value())?,
                _ => {}
            }
        }
        Ok(Self::Features(features))
    }
}

impl Family {
    /// Asks for the family's numbers; `None` if the kernel has no such family.
    pub fn find() -> Result<Option<Self>> {
        let mut requester = Requester::open(NETLINK_GENERIC)?;
        let ask = GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY.to_owned())],
        };
        let answer = match requester.request(GenlMessage::from_payload(ask), 0) {
            Ok(answer) => answer,
            Err(error) if is_not_found(&error) => return Ok(None),
            Err(error) => return Err(error).context("cannot ask for the netlink family netdev"),
        };
        let attributes = || answer.iter().flat_map(|message| &message.payload.nlas);
        let id = attributes().find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
        let group = attributes().find_map(|attribute| match attribute {
            GenlCtrlAttrs::McastGroups(groups) => {
                groups.iter().find_map(|group| group_number(group))
            }
            _ => None,
        });
        Ok(id.map(|id| Self { id, group }))
    }

    /// What every interface of the thread's network namespace can do for XDP.
    pub fn xdp_features(&self) -> Result<Vec<XdpFeatures>> {
        let mut requester = Requester::open(NETLINK_GENERIC)?;
        let mut ask = GenlMessage::from_payload(DevMessage::Get);
        ask.set_resolved_family_id(self.id);
        let answer = requester
            .dump(ask)
            .context("cannot list what the interfaces can do for XDP")?;
        Ok(answer
            .into_iter()
            .filter_map(|message| match message.payload {
                DevMessage::Features(features) => Some(features),
                DevMessage::Get => None,
            })
            .collect())
    }
}

fn group_number(attributes: &[McastGrpAttrs]) -> Option<u32> {
    let named = attributes
        .iter()
        .any(|attribute| matches!(attribute, McastGrpAttrs::Name(name) if name == GROUP));
    let number = attributes.iter().find_map(|attribute| match attribute {
        McastGrpAttrs::Id(number) => Some(*number),
        McastGrpAttrs::Name(_) => None,
    });
    number.filter(|_| named)
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}
