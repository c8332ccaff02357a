package bot

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// The command explain: what a verdict rests on, step by step, in words.

// examiner judges messages anew, as a [cryptohook.Hook] does.
type examiner interface {
	Examine(ctx context.Context, evt *event.Event) (*cryptohook.Examination, error)
	FindKey(ctx context.Context, roomID id.RoomID, sessionID id.SessionID) (found bool, err error)
}

// orderExplain explains the verdict on the message that the command replies to.
func (b *Bot) orderExplain(ctx context.Context, o *order) response {
	return b.explainMessage(ctx, o, b.hook)
}

func (b *Bot) explainMessage(ctx context.Context, o *order, hook examiner) response {
	evt, bad := b.messageMeant(ctx, o)
	if bad != nil {
		return *bad
	}
	found, err := examine(ctx, hook, evt)
	if err != nil {
		return o.failed(ctx, err)
	}
	return response{words: atMost(min(mostClaims, len(found.Claims))+1, func(parts int) words {
		// With names that somebody has made long, rather the steps than the details.
		return b.proofInWords(ctx, o.speech, evt, found, max(parts-1, min(parts, len(found.Claims), 1)), parts > 1 || len(found.Claims) == 0)
	})}
}

// messageMeant gives the message that a command is about, as the homeserver has it. The response says what is wrong if there is none of
// which it could be told who sent it.
func (b *Bot) messageMeant(ctx context.Context, o *order) (evt *event.Event, bad *response) {
	amiss := func(sign, key string, put vars) (*event.Event, *response) {
		r := refuse(o.speech.text(sign, "explain."+key, put), key)
		return nil, &r
	}
	if o.evt.Content.AsMessage().RelatesTo.GetNonFallbackReplyTo() == "" {
		return amiss(signCaution, "no_target", vars{"Command": o.name})
	}
	evt, found, err := b.target(ctx, o)
	switch {
	case err != nil:
		r := o.failed(ctx, err)
		return nil, &r
	case !found:
		return amiss(signCaution, "not_found", nil)
	case evt.Sender == b.client.UserID:
		return amiss(signPlain, "own", nil)
	case evt.StateKey != nil:
		return amiss(signPlain, "state", vars{"Name": showUser(evt.Sender), "Type": showName(evt.Type.Type)})
	case wasRedacted(evt):
		return amiss(signPlain, "redacted", vars{"Name": showUser(evt.Sender)})
	case !slices.Contains([]string{event.EventMessage.Type, event.EventSticker.Type, event.EventEncrypted.Type}, evt.Type.Type):
		return amiss(signPlain, "no_message", vars{"Name": showUser(evt.Sender), "Type": showName(evt.Type.Type)})
	}
	return evt, nil
}

// about says which message is meant. What a command replies to is not encrypted: a server could have another message explained, and proven, than
// the one that somebody has chosen.
func (s speech) about(evt *event.Event) remark {
	return remark(s.phrase("explain.about", vars{"Name": showUser(evt.Sender), "Time": moment(time.UnixMilli(evt.Timestamp)), "Event": showName(evt.ID.String())}))
}

// wasEdited says that the homeserver has an edit of an event.
func wasEdited(evt *event.Event) bool {
	if evt.Unsigned.Relations == nil {
		return false
	}
	_, edited := evt.Unsigned.Relations.Raw[event.RelReplace]
	return edited
}

// examine judges a message. If there is no key to it, the key backup is asked for one first.
func examine(ctx context.Context, hook examiner, evt *event.Event) (*cryptohook.Examination, error) {
	found, err := hook.Examine(ctx, evt)
	if err != nil || found.Verdict.Code != cryptohook.CodeUnableToDecrypt || found.Verdict.SessionID == "" {
		return found, err
	}
	looking, cancel := context.WithTimeout(ctx, recheckPatience)
	defer cancel()
	came, err := hook.FindKey(looking, evt.RoomID, found.Verdict.SessionID)
	if err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Stringer("session_id", found.Verdict.SessionID).Msg("Failed to look for a key in the backup")
	}
	if !came {
		return found, nil
	}
	return hook.Examine(ctx, evt)
}

// mostClaims is how many of the devices that claim a session are told of.
const mostClaims = 5

// proofInWords is the answer: what was said of the message, the steps that lead there, and what to do. Of so many claims it tells.
func (b *Bot) proofInWords(ctx context.Context, s speech, evt *event.Event, found *cryptohook.Examination, claims int, details bool) words {
	said := s.explain(found.Verdict, evt.Sender)
	p := page{text{sign: said.sign, headline: said.headline, known: said.known}, s.about(evt)}
	if wasEdited(evt) {
		p = append(p, remark(s.phrase("explain.edited", nil)))
		p = append(p, b.editsInWords(ctx, s, evt, found.Verdict)...)
	}
	if claims > 0 {
		p = append(p, points{above: s.phrase("explain.steps", nil), items: b.proofSteps(ctx, s, evt, found, claims), numbered: true})
	}
	if said.advice != "" {
		p = append(p, advice(said.advice))
	}
	if details {
		p = append(p, smallPrint{title: s.phrase("explain.details", nil), lines: s.proofDetails(found, claims)})
	}
	return p
}

// proofSteps are the links of the chain from the message to the person, as far as it goes.
func (b *Bot) proofSteps(ctx context.Context, s speech, evt *event.Event, found *cryptohook.Examination, claims int) []string {
	claim, report := found.Claims[0], found.Identity
	if report == nil {
		report = new(cryptohook.UserReport)
	}
	steps := []string{
		s.phrase("explain.server", vars{"Name": showUser(evt.Sender)}),
		s.keyCame(claim),
		s.deviceOf(claim),
	}
	if signed := s.signatureOn(claim, report); signed != "" {
		steps = append(steps, signed)
	}
	if claim.MasterKey != "" {
		steps = append(steps, s.phrase("explain.master_key", vars{"Name": showUser(claim.UserID), "Key": showKey(claim.MasterKey)}))
		if report.MasterKey != "" && report.MasterKey != claim.MasterKey {
			steps = append(steps, s.phrase("explain.other_master_key", vars{"Name": showUser(claim.UserID), "Key": showKey(report.MasterKey)}))
		}
	}
	if report.MasterKey != "" {
		steps = append(steps, b.whoVerified(ctx, s, report), s.historyOf(report))
	}
	for _, other := range found.Claims[1:claims] {
		key := "explain.claimant"
		if other.State == cryptohook.StateRejected {
			key = "explain.claimant_forged"
		}
		steps = append(steps, s.phrase(key, vars{
			"Name": orNobody(s, other.UserID), "Device": showName(other.DeviceID.String()), "Fingerprint": showKey(other.SigningKey),
		}))
	}
	if claim.UserID != "" && claim.UserID != evt.Sender {
		steps = append(steps, s.phrase("explain.mismatch", vars{"Name": showUser(evt.Sender), "Owner": showUser(claim.UserID)}))
	}
	return steps
}

// keyCame words by which way the key to a message came, and when.
func (s speech) keyCame(claim cryptohook.Claim) string {
	came := string(claim.Source)
	if claim.Source == cryptohook.SourceHistoryBundle && claim.SourceUser == "" {
		came = "history_bundle_of_nobody"
	}
	said := s.phrase("explain.key_"+came, vars{"Giver": showUser(claim.SourceUser), "Name": orNobody(s, claim.UserID)})
	if at := moment(claim.ReceivedAt); at != "" {
		return said + " " + s.phrase("explain.key_at", vars{"Time": at})
	}
	return said + " " + s.phrase("explain.key_before", nil)
}

func orNobody(s speech, userID id.UserID) string {
	if userID == "" {
		return s.phrase("explain.nobody", nil)
	}
	return showUser(userID)
}

// deviceOf words which device made a session.
func (s speech) deviceOf(claim cryptohook.Claim) string {
	put := vars{"Name": orNobody(s, claim.UserID), "Device": showName(claim.DeviceID.String()), "Fingerprint": showKey(claim.SigningKey)}
	switch {
	case slices.ContainsFunc(claim.Steps, outcomeIs(cryptohook.StepNotOwner)):
		return s.phrase("explain.device_other", put)
	case claim.UserID == "" || claim.SigningKey == "":
		return s.phrase("explain.device_nobody", put)
	case claim.DeviceID == "":
		return s.phrase("explain.device_unknown", put)
	}
	return s.phrase("explain.device", put)
}

func outcomeIs(outcome cryptohook.StepOutcome) func(cryptohook.Step) bool {
	return func(step cryptohook.Step) bool { return step.Outcome == outcome }
}

// signatureOn words who has confirmed a device; empty: there is no device.
func (s speech) signatureOn(claim cryptohook.Claim, report *cryptohook.UserReport) string {
	put := vars{"Name": orNobody(s, claim.UserID), "Key": showKey(report.SelfSigningKey)}
	for _, step := range slices.Backward(claim.Steps) {
		switch step.Outcome {
		case cryptohook.StepForged, cryptohook.StepSignedEarlier, cryptohook.StepSignedByOther, cryptohook.StepNoIdentity, cryptohook.StepNotSigned:
			return s.phrase("explain."+string(step.Outcome), put)
		case cryptohook.StepSignedByOwner:
			if claim.MasterKey != "" && claim.MasterKey != report.MasterKey {
				// The self-signing key of today is not the one that signed it.
				return s.phrase("explain."+string(cryptohook.StepSignedEarlier), put)
			}
			return s.phrase("explain."+string(step.Outcome), put)
		}
	}
	if claim.MasterKey != "" {
		return s.phrase("explain.signed_before", put)
	}
	return ""
}

// whoVerified words whether somebody has checked whose the account is, who that was, and how.
func (b *Bot) whoVerified(ctx context.Context, s speech, report *cryptohook.UserReport) string {
	put := vars{"Name": showUser(report.UserID), "Key": showKey(report.PinnedKey)}
	switch {
	case report.UserID == b.client.UserID:
		return s.phrase("explain.by_itself", put)
	case report.VerifiedBy == cryptohook.VerifiedByPin:
		return s.phrase("explain.by_pin", put)
	case report.VerifiedBy == cryptohook.VerifiedBySignature:
		return b.whoVerifiedInChat(ctx, s, report)
	case report.Pinned && report.PinnedKey != report.MasterKey:
		return s.phrase("explain.pinned_other", put)
	case report.Standing == cryptohook.StandingViolation:
		return s.phrase("explain.by_nobody_again", put)
	case report.Withdrawn:
		return s.phrase("explain.withdrawn", put)
	}
	return s.phrase("explain.by_nobody", put)
}

func (b *Bot) whoVerifiedInChat(ctx context.Context, s speech, report *cryptohook.UserReport) string {
	put := vars{"Name": showUser(report.UserID)}
	line, err := b.reviser.records.lastVerification(ctx, report.UserID, report.MasterKey)
	if err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to look up who has verified somebody")
	}
	if line == nil {
		return s.phrase("explain.by_account", put)
	}
	put["Operator"], put["Time"], put["Device"] = showUser(line.sender), moment(line.at), showName(line.deviceID.String())
	return s.phrase("explain.by_operator", put)
}

// getVerificationsQuery gives the commands by which somebody was verified, the newest first.
const getVerificationsQuery = `
	SELECT event_id, at_ms, room_id, sender, device_id, master_key, code, command, arguments, outcome, detail
	FROM bot_audit WHERE outcome='done' AND at_ms>0 AND command IN ('verify', 'confirm') ORDER BY at_ms DESC
`

// lastVerification gives the operator's command by which that key of a user was verified last; nil: there is none in the audit table.
func (s *records) lastVerification(ctx context.Context, userID id.UserID, masterKey id.Ed25519) (found *auditLine, err error) {
	rows, err := s.Query(ctx, getVerificationsQuery)
	if err != nil {
		return nil, fmt.Errorf("failed to read the audit table: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		line, err := scanAuditLine(rows)
		if err != nil {
			return nil, fmt.Errorf("failed to read the audit table: %w", err)
		}
		if line.verified(userID, masterKey) {
			return &line, nil
		}
	}
	return nil, rows.Err()
}

// verified says that a line is of a command by which that key of a user was verified: it is in what the operator wrote, or, where emojis were
// compared, in what came of it.
func (line *auditLine) verified(userID id.UserID, masterKey id.Ed25519) bool {
	arguments := strings.Fields(line.arguments)
	if line.command == "confirm" {
		verified, _ := strings.CutPrefix(line.detail, verifiedDetail)
		arguments = strings.Fields(verified)
	}
	if len(arguments) < 2 || mention(arguments[0]) != userID {
		return false
	}
	key, err := ParseMasterKey(strings.Trim(strings.Join(arguments[1:], ""), quotes))
	return err == nil && key == masterKey
}

// mostChanges is how many changes of an identity are told of, the newest.
const mostChanges = 5

// historyOf words since when a user's key is known, and what it was before.
func (s speech) historyOf(report *cryptohook.UserReport) string {
	put := vars{"Name": showUser(report.UserID), "Time": moment(report.FirstSeen)}
	changes := changesOf(report)
	switch {
	case len(changes) > 0:
		put["Changes"] = s.describeChanges(changes)
		return s.phrase("explain.changed", put)
	case report.FirstMasterKey != "" && report.FirstMasterKey != report.MasterKey:
		return s.phrase("explain.changed_before", put)
	case report.FirstSeen.IsZero():
		return s.phrase("explain.unchanged_before", put)
	}
	return s.phrase("explain.unchanged", put)
}

// changesOf gives the recorded changes of a user's master key: the first that was recorded is none.
func changesOf(report *cryptohook.UserReport) []cryptohook.IdentityChange {
	if len(report.Changes) == 0 {
		return nil
	}
	return report.Changes[1:]
}

func (s speech) describeChanges(changes []cryptohook.IdentityChange) string {
	told := changes[max(0, len(changes)-mostChanges):]
	list := make([]string, len(told))
	for i, change := range told {
		at := moment(change.SeenAt)
		if at == "" {
			at = s.phrase("explain.some_time", nil)
		}
		list[i] = s.phrase("explain.change", vars{"Time": at, "Key": showKey(change.MasterKey)})
	}
	if len(told) < len(changes) {
		list = append([]string{"…"}, list...)
	}
	return strings.Join(list, "; ")
}

// proofDetails are what experts want to see: identifiers, keys, and the steps A–J that were walked, a line for each claim.
func (s speech) proofDetails(found *cryptohook.Examination, claims int) []string {
	v := found.Verdict
	lines := []string{s.phrase("explain.detail_event", vars{
		"Event": showName(v.EventID.String()), "Code": clip(string(v.Code)), "State": orDash(string(v.State)),
	})}
	if v.Reason != "" {
		lines = append(lines, s.phrase("explain.detail_reason", vars{"Reason": showName(v.Reason)}))
	}
	if v.SessionID != "" {
		lines = append(lines, s.phrase("explain.detail_session", vars{"Session": showName(v.SessionID.String())}))
	}
	if report := found.Identity; report != nil && report.MasterKey != "" {
		lines = append(lines, s.phrase("explain.detail_identity", vars{
			"MasterKey": clipKey(report.MasterKey), "First": orDash(clipKey(report.FirstMasterKey)), "SelfSigning": orDash(clipKey(report.SelfSigningKey)),
		}))
	}
	for _, claim := range found.Claims[:claims] {
		lines = append(lines, s.phrase("explain.detail_claim", vars{
			"Name": orNobody(s, claim.UserID), "Device": orDash(showName(claim.DeviceID.String())), "SenderKey": orDash(clipKey(claim.SenderKey)),
			"SigningKey": orDash(clipKey(claim.SigningKey)), "State": orDash(string(claim.State)), "Source": orDash(string(claim.Source)),
			"Reason": showName(claim.Reason), "Updated": orDash(moment(claim.UpdatedAt)), "Retry": moment(claim.NextRetry),
		}), s.describeSteps(claim.Steps))
	}
	return lines
}

func orDash(text string) string {
	if text == "" {
		return "–"
	}
	return text
}

// describeSteps names the steps A–J that were walked, each with what came of it.
func (s speech) describeSteps(steps []cryptohook.Step) string {
	told := make([]string, len(steps))
	for i, step := range steps {
		told[i] = step.Letter + ": " + s.phrase("explain.step."+string(step.Outcome), nil)
	}
	return s.phrase("explain.detail_steps", vars{"Steps": strings.Join(told, " → ")})
}
