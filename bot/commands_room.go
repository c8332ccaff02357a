package bot

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// The command room: who is in it, and what each of them is worth.

// ranking knows what many users are worth, as a [cryptohook.Hook] does.
type ranking interface {
	Standings(ctx context.Context, users []id.UserID) (map[id.UserID]cryptohook.UserStanding, error)
}

const (
	// mostRows is how many members are listed, the most worrying first.
	mostRows = 30
	// standingsAtOnce is how many members are looked up in one go.
	standingsAtOnce = 500
)

// orderRoom tells who is in the room.
func (b *Bot) orderRoom(ctx context.Context, o *order) response {
	return b.describeRoom(ctx, o, b.hook)
}

func (b *Bot) describeRoom(ctx context.Context, o *order, hook ranking) response {
	members, err := b.membersByWorry(ctx, o.evt.RoomID, hook)
	if err != nil {
		return o.failed(ctx, err)
	}
	facts, err := b.roomFacts(ctx, o.speech, o.evt.RoomID, members)
	if err != nil {
		return o.failed(ctx, err)
	}
	return response{words: atMost(min(mostRows, len(members)), func(rows int) words { return roomInWords(o.speech, members, facts, rows) })}
}

// roomMember is a row of the table.
type roomMember struct {
	cryptohook.UserStanding
	standing standing
}

// worries are what members may be worth, the most worrying first.
var worries = []standing{
	standingReplaced, standingChanged, standingNoIdentity, standingUnknown, standingUnverified, standingVerified, standingSelf,
}

// membersByWorry gives who is in a room, the most worrying first: by what their identities are worth, then those who have devices that they
// have not confirmed, then by name.
func (b *Bot) membersByWorry(ctx context.Context, roomID id.RoomID, hook ranking) ([]roomMember, error) {
	all, err := b.client.StateStore.GetAllMembers(ctx, roomID)
	if err != nil {
		return nil, fmt.Errorf("failed to look up the members of %s: %w", roomID, err)
	}
	joined := make([]id.UserID, 0, len(all))
	for userID, member := range all {
		if member.Membership == event.MembershipJoin {
			joined = append(joined, userID)
		}
	}
	members := make([]roomMember, 0, len(joined))
	for some := range slices.Chunk(joined, standingsAtOnce) {
		standings, err := hook.Standings(ctx, some)
		if err != nil {
			return nil, err
		}
		for _, userID := range some {
			members = append(members, b.memberOf(userID, standings[userID]))
		}
	}
	slices.SortFunc(members, func(one, other roomMember) int {
		return cmp.Or(
			cmp.Compare(slices.Index(worries, one.standing), slices.Index(worries, other.standing)),
			cmp.Compare(min(other.Unsigned, 1), min(one.Unsigned, 1)),
			cmp.Compare(one.UserID, other.UserID),
		)
	})
	return members, nil
}

func (b *Bot) memberOf(userID id.UserID, known cryptohook.UserStanding) roomMember {
	known.UserID = userID
	member := roomMember{UserStanding: known}
	switch {
	case userID == b.client.UserID:
		member.standing = standingSelf
	case known.Standing == cryptohook.StandingVerified:
		member.standing = standingVerified
	case known.Standing == cryptohook.StandingViolation:
		member.standing = standingReplaced
	case !known.Known:
		member.standing = standingUnknown
	case known.MasterKey == "":
		member.standing = standingNoIdentity
	case known.Changed:
		member.standing = standingChanged
	default:
		member.standing = standingUnverified
	}
	return member
}

// roomFacts are what is known of the room as a whole, a sentence each: first, whether it is encrypted.
func (b *Bot) roomFacts(ctx context.Context, s speech, roomID id.RoomID, members []roomMember) ([]string, error) {
	encrypted, err := b.client.StateStore.IsEncrypted(ctx, roomID)
	if err != nil {
		return nil, fmt.Errorf("failed to look up whether the room is encrypted: %w", err)
	}
	visibility, err := b.client.StateStore.GetHistoryVisibility(ctx, roomID)
	if err != nil {
		return nil, fmt.Errorf("failed to look up who may read the room's history: %w", err)
	}
	facts := []string{s.phrase("room.in_clear", nil), s.phrase(historyKey(visibility), nil), s.countStandings(members)}
	if encrypted {
		facts[0] = s.phrase("room.encrypted", nil)
	}
	unchecked, outdated := 0, 0
	for _, member := range members {
		if member.standing == standingNoIdentity || member.standing == standingUnknown {
			unchecked++
		}
		if member.Outdated {
			outdated++
		}
	}
	if unchecked > 0 {
		facts = append(facts, s.counted("room.unchecked", unchecked, nil))
	} else {
		facts = append(facts, s.phrase("room.all_checked", nil))
	}
	if outdated > 0 {
		facts = append(facts, s.counted("room.outdated", outdated, nil))
	}
	return facts, nil
}

// historyKey is the text for who may read what was written before they came.
// https://spec.matrix.org/v1.16/client-server-api/#room-history-visibility
func historyKey(content *event.HistoryVisibilityEventContent) string {
	if content == nil {
		return "room.history_shared" // the specification's default
	}
	switch content.HistoryVisibility {
	case event.HistoryVisibilityInvited, event.HistoryVisibilityJoined, event.HistoryVisibilityWorldReadable:
		return "room.history_" + string(content.HistoryVisibility)
	}
	return "room.history_shared"
}

// countStandings says how many members are worth what.
func (s speech) countStandings(members []roomMember) string {
	counts := make(map[standing]int)
	for _, member := range members {
		counts[member.standing]++
	}
	var told []string
	for _, worry := range worries {
		if count := counts[worry]; count > 0 && worry != standingSelf {
			told = append(told, fmt.Sprintf("%d × %s %s", count, worry.sign(), s.phrase("room.is_"+string(worry), nil)))
		}
	}
	if len(told) == 0 {
		return s.phrase("room.alone", nil)
	}
	return strings.Join(told, ", ")
}

// roomInWords is the answer about a room, with so many rows.
func roomInWords(s speech, members []roomMember, facts []string, rows int) words {
	list := table{head: []string{s.phrase("room.head_member", nil), s.phrase("room.head_standing", nil), s.phrase("room.head_devices", nil)}}
	for _, member := range members[:rows] {
		list.rows = append(list.rows, s.memberRow(member))
	}
	sign := signPlain
	if len(members) > 0 && members[0].standing.sign() != signVerified {
		sign = members[0].standing.sign()
	}
	p := page{text{sign: sign, headline: s.counted("room.headline", len(members), nil), known: facts[0]}, points{items: facts[1:]}, list}
	if left := members[rows:]; len(left) > 0 {
		p = append(p, remark(s.counted("room.more", len(left), vars{"Standings": s.countStandings(left)})))
	}
	return append(p, advice(s.phrase("room.advice", nil)))
}

func (s speech) memberRow(member roomMember) []string {
	devices := s.phrase("room.devices", vars{"Signed": member.Signed, "Unsigned": member.Unsigned})
	if member.Outdated {
		devices += " " + s.phrase("room.stale", nil)
	}
	return []string{
		member.standing.sign() + " " + showUser(member.UserID), s.phrase("room.is_"+string(member.standing), nil), devices,
	}
}
