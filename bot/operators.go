package bot

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// Operators tell the bot whom they have verified. Their word counts only if the message that gives it is verified itself: who can write
// in an operator's name must not be able to make others trusted. So an operator has to be verified first, by a pin in the configuration
// or by another operator.

// carryOutForOperators does what an operator says. Whatever comes of it is in the audit table before anybody is told.
func (b *Bot) carryOutForOperators(ctx context.Context, c command, o *order) response {
	// After a crash it comes again. What was commanded since is not to be undone by it.
	if before, err := b.reviser.records.auditOf(ctx, o.evt.ID); err != nil {
		return o.failed(ctx, err)
	} else if before != nil && before.outcome != auditBegun {
		return say(o.speech.text(signPlain, "command.again", vars{"Outcome": o.speech.phrase("audit.outcome_"+before.outcome, nil)}))
	}
	if why := b.withoutAuthority(ctx, o); why != "" {
		r := refuse(b.refusal(o, why), why)
		b.note(ctx, o, r)
		return r
	}
	if c.unaudited {
		return c.run(b, ctx, o)
	}
	if err := b.reviser.records.putAudit(ctx, b.lineOf(o, auditBegun, "")); err != nil {
		return o.failed(ctx, err)
	}
	r := c.run(b, ctx, o)
	b.note(ctx, o, r)
	return r
}

// Why somebody is not obeyed.
const (
	whyNobody      = "no_operators"
	whyNotOperator = "not_operator"
	whyNotVerified = "not_verified"
	whyLate        = "late"
	whyNotSure     = "not_sure"
	whyNotMember   = "not_member"
	whyDeviceGone  = "device_gone"
)

// withoutAuthority says why an order is not an operator's; empty: it is. The verdict that counts is today's: between the message and now
// somebody may have been found out.
func (b *Bot) withoutAuthority(ctx context.Context, o *order) string {
	operators := b.config.Trust.Operators
	switch {
	case len(operators) == 0:
		return whyNobody
	case !slices.Contains(operators, o.evt.Sender):
		return whyNotOperator
	case o.verdict.Late:
		return whyLate
	}
	now, err := b.hook.Review(ctx, o.verdict, o.evt.Sender)
	if err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to look at the verdict on a command again")
		return whyNotSure
	}
	switch {
	case o.verdict.Code != cryptohook.CodeVerified:
		return whyNotVerified
	case now.Code != cryptohook.CodeVerified || now.UserID != o.evt.Sender:
		o.verdict = now
		return whyNotVerified
	case now.Outdated || o.verdict.Outdated:
		return whyNotSure
	case !b.isMember(ctx, o.evt.RoomID, o.evt.Sender):
		return whyNotMember
	}
	return b.withoutDevice(ctx, o.evt.Sender, now.DeviceID)
}

// withoutDevice says why an operator's device does not count: messages of one that was logged out stay verified, but whoever has it now is
// not to be obeyed.
func (b *Bot) withoutDevice(ctx context.Context, userID id.UserID, deviceID id.DeviceID) string {
	report, err := b.hook.User(ctx, userID)
	if err == nil && report != nil && report.Outdated {
		asking, cancel := context.WithTimeout(ctx, recheckPatience)
		defer cancel()
		if err = b.hook.Recheck(asking, []id.UserID{userID}); err == nil {
			report, err = b.hook.User(ctx, userID)
		}
	}
	switch {
	case err != nil:
		zerolog.Ctx(ctx).Err(err).Msg("Failed to look up which devices an operator has")
		return whyNotSure
	case report == nil || report.Outdated:
		return whyNotSure
	case !deviceIn(report, deviceID):
		return whyDeviceGone
	}
	return ""
}

// isMember says that somebody is known to be in a room.
func (b *Bot) isMember(ctx context.Context, roomID id.RoomID, userID id.UserID) bool {
	member, err := b.client.StateStore.TryGetMember(ctx, roomID, userID)
	return err == nil && member != nil && member.Membership == event.MembershipJoin
}

// refusal words why a command does not count.
func (b *Bot) refusal(o *order, why string) text {
	headline := ""
	if why == whyNotVerified {
		headline = o.speech.explain(o.verdict, o.evt.Sender).headline
	}
	return o.speech.text(signWarning, "operator."+why, vars{
		"Name": showUser(o.evt.Sender), "Command": o.name, "Headline": headline, "Operators": b.describeOperators(),
	})
}

// describeOperators names those whom somebody may ask.
func (b *Bot) describeOperators() string {
	names := make([]string, 0, len(b.config.Trust.Operators))
	for _, operator := range b.config.Trust.Operators {
		names = append(names, showUser(operator))
	}
	return strings.Join(names, ", ")
}

// noteImpersonation writes down that a message in an operator's name was not the operator's, and could not be read: it may have been a
// command.
func (b *Bot) noteImpersonation(ctx context.Context, evt *event.Event, verdict cryptohook.Verdict) {
	if !slices.Contains(b.config.Trust.Operators, evt.Sender) {
		return
	}
	notTheirs := verdict.Code == cryptohook.CodeMismatchedSender || verdict.Code == cryptohook.CodeSessionRejected ||
		verdict.Code == cryptohook.CodeUnableToDecrypt && verdict.Reason == cryptohook.ReasonWrongRoom
	if notTheirs {
		o := &order{evt: evt, verdict: verdict, name: "?"}
		b.audit(ctx, b.lineOf(o, string(outcomeRefused), strings.TrimSpace("a message in an operator's name that is not theirs: "+verdict.Reason)))
	}
}

// person reads the user that a command names. The response says what is wrong if it is none.
func (o *order) person() (userID id.UserID, bad *response) {
	if len(o.args) == 0 {
		r := refuse(o.speech.text(signCaution, "command.no_user", vars{"Command": o.name}), "no user")
		return "", &r
	}
	userID = mention(o.args[0])
	if !isFullUserID(userID) {
		r := refuse(o.speech.text(signCaution, "command.not_a_user", vars{"Given": showUser(userID), "Command": o.name}), "not a Matrix ID")
		return "", &r
	}
	return userID, nil
}

// orderVerify notes that an operator has checked somebody's master key.
func (b *Bot) orderVerify(ctx context.Context, o *order) response {
	userID, bad := o.person()
	if bad != nil {
		return *bad
	}
	given := strings.Trim(strings.Join(o.args[1:], ""), quotes)
	if given == "" {
		return b.startVerification(ctx, o, userID)
	}
	key, err := ParseMasterKey(given)
	if err != nil {
		return refuse(o.speech.text(signCaution, "verify.bad_key", vars{"Name": showUser(userID), "Length": strconv.Itoa(len(given))}), "not a master key: "+err.Error())
	}
	if r := b.against(ctx, o, userID, key); r != nil {
		return *r
	}
	return b.verifyKey(ctx, o, userID, key)
}

// against asks an operator to say it again if an operator has taken back before that the user is verified: a server may have kept back the
// message that says it since before that.
func (b *Bot) against(ctx context.Context, o *order, userID id.UserID, key id.Ed25519) *response {
	report, err := b.hook.User(ctx, userID)
	if err != nil {
		r := o.failed(ctx, err)
		return &r
	} else if report == nil || report.MasterKey != key || report.PinnedKey != "" || len(report.WithdrawnKeys) == 0 {
		return nil
	}
	r := refuse(o.speech.text(signCaution, "verify.again", vars{
		"Name": showUser(userID), "Key": groups(key), "Code": b.verifications.think(userID, key),
	}), "has to be confirmed: it was taken back before")
	return &r
}

// verifyKey signs somebody's master key.
func (b *Bot) verifyKey(ctx context.Context, o *order, userID id.UserID, key id.Ed25519) response {
	err := b.hook.Verify(ctx, userID, key)
	if errors.Is(err, cryptohook.ErrUnknownIdentity) || errors.Is(err, cryptohook.ErrOtherMasterKey) {
		// Perhaps nobody has asked for it lately.
		if err = b.hook.Recheck(ctx, []id.UserID{userID}); err == nil {
			err = b.hook.Verify(ctx, userID, key)
		}
	}
	if err != nil {
		return b.undecided(ctx, o, userID, err)
	}
	r := say(o.speech.text(signVerified, "verify.done", vars{"Name": showUser(userID), "Key": groups(key)}))
	r.detail = verifiedDetail + userID.String() + " " + key.String()
	return r
}

// orderUnverify takes back that somebody is verified.
func (b *Bot) orderUnverify(ctx context.Context, o *order) response {
	userID, bad := o.person()
	if bad != nil {
		return *bad
	}
	if err := b.hook.WithdrawVerification(ctx, userID); err != nil {
		return b.undecided(ctx, o, userID, err)
	}
	return say(o.speech.text(signPlain, "unverify.done", vars{"Name": showUser(userID)}))
}

// undecided words why somebody cannot be verified, or be unverified.
func (b *Bot) undecided(ctx context.Context, o *order, userID id.UserID, err error) response {
	put := vars{"Name": showUser(userID), "Odd": o.speech.lookAlike(userID)}
	switch {
	case errors.Is(err, cryptohook.ErrPinned):
		put["Key"] = groups(b.config.Trust.VerifiedUsers[userID])
		return refuse(o.speech.text(signCaution, "verify.pinned", put), "pinned in the configuration")
	case errors.Is(err, cryptohook.ErrOwnUser):
		return refuse(o.speech.text(signPlain, "verify.myself", put), "the bot itself")
	case errors.Is(err, cryptohook.ErrUnknownIdentity):
		return refuse(o.speech.text(signCaution, "verify.no_identity", put), "no identity")
	case errors.Is(err, cryptohook.ErrOtherMasterKey):
		return refuse(o.speech.text(signWarning, "verify.other_key", put), "another master key")
	}
	return o.failed(ctx, err)
}

// mostRechecked is how many members of a room are asked for at once.
const mostRechecked = 1000

// orderRecheck asks the homeserver for the keys of somebody, or of everybody in the room, and judges their messages anew.
func (b *Bot) orderRecheck(ctx context.Context, o *order) response {
	var users []id.UserID
	if len(o.args) > 0 {
		userID, bad := o.person()
		if bad != nil {
			return *bad
		}
		users = []id.UserID{userID}
	} else {
		members, err := b.client.StateStore.GetRoomJoinedOrInvitedMembers(ctx, o.evt.RoomID)
		if err != nil {
			return o.failed(ctx, err)
		}
		users = members[:min(len(members), mostRechecked)]
	}
	if err := b.hook.Recheck(ctx, users); err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to ask for users' keys")
		return response{words: o.speech.text(signCaution, "recheck.failed", nil), outcome: outcomeFailed, detail: "the homeserver did not answer"}
	}
	return say(text{sign: signPlain, headline: o.speech.counted("recheck.done.headline", len(users), nil), known: o.speech.phrase("recheck.done.known", nil)})
}

const (
	auditShown = 20
	auditMost  = 200
)

// orderAudit shows who has told the bot what.
func (b *Bot) orderAudit(ctx context.Context, o *order) response {
	count := auditShown
	if len(o.args) > 0 {
		given, err := strconv.Atoi(o.args[0])
		if err != nil || given < 1 || given > auditMost {
			return refuse(o.speech.text(signCaution, "audit.bad_count", vars{"Most": auditMost}), "not a number")
		}
		count = given
	}
	lines, err := b.reviser.records.lastAudits(ctx, count)
	if err != nil {
		return o.failed(ctx, err)
	}
	if len(lines) == 0 {
		return say(o.speech.text(signPlain, "audit.none", nil))
	}
	return response{words: atMost(len(lines), func(shown int) words { return o.speech.auditLines(lines[:shown]) })}
}

// auditLines words the newest lines of the audit table.
func (s speech) auditLines(lines []auditLine) words {
	said := points{above: signPlain + " " + s.phrase("audit.headline", vars{"Count": len(lines)})}
	for _, line := range lines {
		said.items = append(said.items, s.auditLine(line))
	}
	return said
}

// auditLine words a line of the audit table.
func (s speech) auditLine(line auditLine) string {
	outcome := line.outcome
	if outcome == auditBegun {
		outcome = "begun"
	}
	return s.phrase("audit.line", vars{
		"Time": line.at.UTC().Format("2006-01-02 15:04:05 UTC"), "Name": showUser(line.sender), "Device": showDevice(line.deviceID),
		"Key": line.masterKey, "Code": line.code, "Command": strings.TrimSpace(line.command + " " + line.arguments),
		"Outcome": s.phrase("audit.outcome_"+outcome, nil), "Detail": line.detail, "Event": line.eventID, "Room": line.roomID,
	})
}
