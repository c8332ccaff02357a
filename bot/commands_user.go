package bot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// The command user: what is known of an account and its devices.

// directory knows users, as a [cryptohook.Hook] does.
type directory interface {
	User(ctx context.Context, userID id.UserID) (*cryptohook.UserReport, error)
	Recheck(ctx context.Context, users []id.UserID) error
}

const (
	// recheckPatience is how long somebody who asks waits for the homeserver to answer.
	recheckPatience = 8 * time.Second
	// mostDevices is how many devices of a user are listed.
	mostDevices = 20
)

// orderUser tells what is known of a user; without a name, of who asks.
func (b *Bot) orderUser(ctx context.Context, o *order) response {
	return b.describeUser(ctx, o, b.hook, func() bool { return b.withoutAuthority(ctx, o) == "" })
}

func (b *Bot) describeUser(ctx context.Context, o *order, hook directory, byOperator func() bool) response {
	userID := o.evt.Sender
	if len(o.args) > 0 {
		named, bad := o.person()
		if bad != nil {
			return *bad
		}
		userID = named
	}
	put := vars{"Name": showUser(userID), "Odd": o.speech.lookAlike(userID)}
	if userID == b.client.UserID {
		return say(o.speech.text(signPlain, "user.myself", put))
	}
	if !b.mayAskAbout(ctx, o, userID, byOperator) {
		put["Operators"] = clipTo(b.describeOperators(), longestOperators)
		return refuse(o.speech.text(signCaution, "user.stranger", put), "not a member of the room")
	}
	report, answered, err := lookUp(ctx, hook, userID)
	if err != nil {
		return o.failed(ctx, err)
	}
	if report == nil {
		key := "user.unknown"
		if !answered {
			key = "user.no_answer"
		}
		return say(o.speech.text(signCaution, key, put))
	}
	names, err := b.namesIn(ctx, o.evt.RoomID, userID)
	if err != nil {
		return o.failed(ctx, err)
	}
	return response{words: atMost(mostDevices, func(devices int) words { return b.userInWords(ctx, o.speech, report, names, devices) })}
}

// mayAskAbout says whether somebody may be told of a user: everybody of who has joined the same room, and only operators of others. Whom the
// bot knows from its other rooms is not for people here to find out, and of strangers the homeserver would have to be asked.
func (b *Bot) mayAskAbout(ctx context.Context, o *order, userID id.UserID, byOperator func() bool) bool {
	return userID == o.evt.Sender || b.isMember(ctx, o.evt.RoomID, userID) || byOperator()
}

// lookUp gives what is known of a user; nil: nothing. If it is nothing, or out of date, the homeserver is asked first, once: answered says
// whether that worked.
func lookUp(ctx context.Context, hook directory, userID id.UserID) (report *cryptohook.UserReport, answered bool, err error) {
	report, err = hook.User(ctx, userID)
	if err != nil || report != nil && !report.Outdated {
		return report, true, err
	}
	asking, cancel := context.WithTimeout(ctx, recheckPatience)
	defer cancel()
	if err = hook.Recheck(asking, []id.UserID{userID}); err != nil {
		if _, unanswered := errors.AsType[*cryptohook.UnansweredError](err); !unanswered && asking.Err() == nil {
			zerolog.Ctx(ctx).Warn().Err(err).Stringer("user_id", userID).Msg("Failed to ask for a user's keys")
		}
		return report, false, ctx.Err()
	}
	report, err = hook.User(ctx, userID)
	return report, true, err
}

// userInWords is the answer about a user, with so many devices.
func (b *Bot) userInWords(ctx context.Context, s speech, report *cryptohook.UserReport, names namesInRoom, devices int) words {
	standing := standingOf(report)
	put := vars{"Name": showUser(report.UserID)}
	said := s.text(standing.sign(), "user."+string(standing), put)
	p := page{text{sign: said.sign, headline: said.headline, known: said.known}, points{items: b.userFacts(ctx, s, report, names)}}
	if len(report.Devices) > 0 {
		p = append(p, points{above: s.counted("user.devices", len(report.Devices), nil), items: s.deviceList(report, devices)})
	}
	if said.advice != "" {
		p = append(p, advice(said.advice))
	}
	return p
}

// standing is what an account is worth, in the words of the languages' sections user and room.
type standing string

const (
	standingVerified   standing = "verified"
	standingUnverified standing = "unverified"
	standingChanged    standing = "changed"
	standingReplaced   standing = "replaced"    // a verified identity was
	standingNoIdentity standing = "no_identity" // nothing confirms the account's devices
	standingUnknown    standing = "unknown"     // nothing is known of the account at all
	standingSelf       standing = "self"
)

func (st standing) sign() string {
	switch st {
	case standingVerified:
		return signVerified
	case standingReplaced:
		return signWarning
	case standingChanged, standingNoIdentity, standingUnknown:
		return signCaution
	}
	return signPlain
}

func standingOf(report *cryptohook.UserReport) standing {
	switch {
	case report.Standing == cryptohook.StandingVerified:
		return standingVerified
	case report.Standing == cryptohook.StandingViolation:
		return standingReplaced
	case report.MasterKey == "":
		return standingNoIdentity
	case report.MasterKey != report.FirstMasterKey:
		return standingChanged
	}
	return standingUnverified
}

// userFacts are what is known of a user's identity, a sentence each.
func (b *Bot) userFacts(ctx context.Context, s speech, report *cryptohook.UserReport, names namesInRoom) []string {
	var facts []string
	if odd := s.lookAlike(report.UserID); odd != "" {
		facts = append(facts, odd)
	}
	facts = append(facts, names.inWords(s)...)
	put := vars{"Name": showUser(report.UserID), "Key": showKey(report.MasterKey), "Pin": showKey(report.PinnedKey)}
	if report.MasterKey != "" {
		facts = append(facts, s.phrase("user.key", put))
	}
	switch {
	case !report.Pinned:
	case report.PinnedKey == report.MasterKey:
		facts = append(facts, s.phrase("user.pin_same", put))
	default:
		facts = append(facts, s.phrase("user.pin_other", put))
	}
	if report.MasterKey != "" {
		if !report.Pinned {
			facts = append(facts, b.whoVerified(ctx, s, report))
		}
		facts = append(facts, s.historyOf(report))
	}
	if report.Outdated {
		facts = append(facts, s.phrase("user.outdated", nil))
	}
	return facts
}

// deviceList names a user's devices, the living ones first, each with what is known of it.
func (s speech) deviceList(report *cryptohook.UserReport, most int) []string {
	shown := report.Devices[:min(len(report.Devices), most)]
	items := make([]string, 0, len(shown)+1)
	for _, device := range shown {
		state := "device_unconfirmed"
		switch {
		case device.Deleted:
			state = "device_gone"
		case device.SignedByOwner:
			state = "device_confirmed"
		}
		name := ""
		if device.Name != "" {
			name = " " + quoted(device.Name)
		}
		items = append(items, s.phrase("user."+state, vars{
			"Device": showName(device.DeviceID.String()), "Called": name, "Fingerprint": showKey(device.SigningKey),
		}))
	}
	if left := len(report.Devices) - len(shown); left > 0 {
		items = append(items, s.counted("user.more_devices", left, nil))
	}
	return items
}

// longestCalled is how much of what people call themselves, or their devices, is shown, in characters.
const longestCalled = 40

// quoted shows a name that somebody has chosen, so that it can be taken for nothing else.
func quoted(name string) string {
	name = strings.NewReplacer("«", "‹", "»", "›").Replace(clipTo(name, longestCalled))
	return "«" + showText(name) + "»"
}

// namesInRoom is what a member of a room is called there.
type namesInRoom struct {
	userID id.UserID
	// called is the display name; empty: there is none, or it had better not be shown.
	called string
	// looksLikeID says that the display name looks like the Matrix ID of somebody.
	looksLikeID bool
	// alike are the members whose name or Matrix ID people would take for the display name.
	alike []id.UserID
}

// mostAlike is how many members with the same name are told of.
const mostAlike = 5

// namesIn looks up what a user is called in a room, and whether others are called the same.
func (b *Bot) namesIn(ctx context.Context, roomID id.RoomID, userID id.UserID) (namesInRoom, error) {
	members, err := b.client.StateStore.GetAllMembers(ctx, roomID)
	if err != nil {
		return namesInRoom{}, fmt.Errorf("failed to look up the members of %s: %w", roomID, err)
	}
	return compareNames(members, userID), nil
}

func compareNames(members map[id.UserID]*event.MemberEventContent, userID id.UserID) namesInRoom {
	names := namesInRoom{userID: userID}
	own := members[userID]
	if own == nil || strings.TrimSpace(own.Displayname) == "" {
		return names
	}
	looks := lookOf(own.Displayname)
	for other, member := range members {
		if other == userID || member.Membership != event.MembershipJoin && member.Membership != event.MembershipInvite {
			continue
		}
		localpart, _, _ := other.Parse()
		if looks == lookOf(member.Displayname) || looks == lookOf(localpart) || looks == lookOf(other.String()) {
			names.alike = append(names.alike, other)
		}
	}
	slices.Sort(names.alike)
	localpart, _, _ := userID.Parse()
	if looks == lookOf(userID.String()) || looks == lookOf("@"+localpart) || looks == lookOf(localpart) {
		return names // it says what the ID says
	}
	names.looksLikeID = strings.ContainsAny(looks, "@:")
	if !names.looksLikeID && len(names.alike) == 0 {
		names.called = own.Displayname
	}
	return names
}

// inWords says what a member is called, and warns of what that may be taken for.
func (n namesInRoom) inWords(s speech) (said []string) {
	put := vars{"Name": showUser(n.userID)}
	if n.called != "" {
		put["Called"] = quoted(n.called)
		said = append(said, s.phrase("user.called", put))
	}
	if n.looksLikeID {
		said = append(said, s.phrase("user.called_like_id", put))
	}
	if len(n.alike) > 0 {
		shown := make([]string, 0, mostAlike+1)
		for _, other := range n.alike[:min(len(n.alike), mostAlike)] {
			shown = append(shown, showUser(other))
		}
		if len(n.alike) > mostAlike {
			shown = append(shown, "…")
		}
		put["Others"] = strings.Join(shown, ", ")
		said = append(said, s.phrase("user.called_like_others", put))
	}
	return said
}
