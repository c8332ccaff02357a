package bot

import (
	"context"
	"slices"
	"strings"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// What people can tell the bot to do: !trust explain, !trust verify …
//
// A command is answered like any message, by a notice that carries the verdict on the command itself. Those that change whom the bot
// trusts are for its operators: see operators.go.

// command is one thing that the bot can do.
type command struct {
	name string
	// operators says that only operators may have it done. Everybody who tries is in the audit table.
	operators bool
	// unaudited is an operators' command that changes nothing.
	unaudited bool
	run       func(b *Bot, ctx context.Context, o *order) response
}

// commandList is in the order of the help. Its texts are in the section help.NAME of the languages.
func commandList() []command {
	return []command{
		{name: "help", run: (*Bot).orderHelp},
		{name: "explain", run: (*Bot).orderExplain},
		{name: "user", run: (*Bot).orderUser},
		{name: "room", run: (*Bot).orderRoom},
		{name: "status", run: (*Bot).orderStatus},
		{name: "proof", run: (*Bot).orderProof},
		{name: "mode", run: (*Bot).orderMode},
		{name: "verify", operators: true, run: (*Bot).orderVerify},
		{name: "unverify", operators: true, run: (*Bot).orderUnverify},
		{name: "confirm", operators: true, run: (*Bot).orderConfirm},
		{name: "deny", operators: true, run: (*Bot).orderDeny},
		{name: "recheck", operators: true, run: (*Bot).orderRecheck},
		{name: "audit", operators: true, unaudited: true, run: (*Bot).orderAudit},
	}
}

func findCommand(name string) (command, bool) {
	list := commandList()
	i := slices.IndexFunc(list, func(c command) bool { return c.name == name })
	if i < 0 {
		return command{}, false
	}
	return list[i], true
}

// words is what the bot says, for clients without and with HTML.
type words interface {
	plain() string
	html() string
}

// response is what somebody gets for a command.
type response struct {
	words words
	// attachments follow the words, each as a message of its own.
	attachments []attachmentFile
	// outcome and detail are for the audit table; empty: it was done.
	outcome outcome
	detail  string
}

// attachmentFile is a picture or a file that belongs to a response.
type attachmentFile struct {
	msgType  event.MessageType // m.image or m.file
	name     string
	mimeType string
	data     []byte
	// width and height are a picture's, in pixels.
	width, height int
}

// say is a response of nothing but words.
func say(t text) response { return response{words: t} }

// refuse is a response to a command that was not carried out: what would be right is in its words.
func refuse(t text, detail string) response {
	return response{words: t, outcome: outcomeRefused, detail: detail}
}

// failed is a response to a command that could not be carried out, for no fault of who gave it.
func (o *order) failed(ctx context.Context, err error) response {
	zerolog.Ctx(ctx).Err(err).Str("command", o.name).Msg("Failed to carry out a command")
	return response{words: o.speech.text(signWarning, "command.failed", nil), outcome: outcomeFailed, detail: "an error; see the log"}
}

// obey answers a command, and carries it out if it may be.
func (b *Bot) obey(ctx context.Context, o *order) {
	_, known := findCommand(o.name)
	if known { // anything else may be part of what people say to each other
		log := zerolog.Ctx(ctx).With().Str("command", o.name).Logger()
		ctx = log.WithContext(ctx)
	}
	// Who floods a room is not to keep its operators from saying what is to be done.
	operator := o.verdict.Code == cryptohook.CodeVerified && slices.Contains(b.config.Trust.Operators, o.evt.Sender)
	if !operator && !b.mayAnswer(ctx, o.evt, o.verdict) {
		return
	}
	b.respond(ctx, o, b.carryOut(ctx, o))
}

// carryOut does what an order says, or says why not.
func (b *Bot) carryOut(ctx context.Context, o *order) response {
	if o.fault != "" {
		r := refuse(o.speech.text(signCaution, "command."+o.fault, vars{"Limit": longestCommand}), o.fault)
		if c, known := findCommand(o.name); !known || c.operators {
			b.note(ctx, o, r)
		}
		return r
	}
	c, known := findCommand(o.name)
	if !known {
		return refuse(o.speech.text(signPlain, "command.unknown", vars{"Command": clip(o.name)}), "unknown")
	}
	if !c.operators {
		return c.run(b, ctx, o)
	}
	return b.carryOutForOperators(ctx, c, o)
}

// respond answers an order. After a crash it is carried out again, and the answer is the same event.
func (b *Bot) respond(ctx context.Context, o *order, r response) {
	relation := replyTo(o.evt.ID, threadOf(o.evt))
	content := noticeContent(o.withVerdict(b, r.words), relation)
	content.Raw = map[string]any{annotationKey: b.annotate(o.verdict)}
	answerID, sent := b.send(ctx, o.evt.RoomID, content, transactionID(o.evt.ID))
	if !sent {
		return
	}
	zerolog.Ctx(ctx).Info().Str("outcome", string(r.outcome)).Str("code", string(o.verdict.Code)).Stringer("answer_id", answerID).Msg("Answered a command")
	b.noteAnsweredCommand(ctx, o, answerID)
	for i, a := range r.attachments {
		b.attach(ctx, o, a, i)
	}
}

// withVerdict adds what is wrong with the message that gave the command, if it is worth a warning.
func (o *order) withVerdict(b *Bot, w words) words {
	if b.shield(o.verdict.Code) == cryptohook.ShieldNone {
		return w
	}
	own := o.speech.explain(o.verdict, o.evt.Sender)
	return page{w, remark(o.speech.phrase("command.your_message", vars{"Headline": own.sign + " " + own.headline}))}
}

// attach sends a picture or a file, encrypted if the room is. What the homeserver does not take is left: the words have been said.
func (b *Bot) attach(ctx context.Context, o *order, a attachmentFile, number int) {
	content := &event.MessageEventContent{
		MsgType: a.msgType, Body: a.name, FileName: a.name, RelatesTo: replyTo(o.evt.ID, threadOf(o.evt)), Mentions: &event.Mentions{},
		Info: &event.FileInfo{MimeType: a.mimeType, Size: len(a.data), Width: a.width, Height: a.height},
	}
	if err := b.upload(ctx, o.evt.RoomID, content, a); err != nil {
		zerolog.Ctx(ctx).Err(err).Str("file", a.name).Msg("Failed to upload a file that belongs to an answer")
		return
	}
	b.send(ctx, o.evt.RoomID, &event.Content{Parsed: content}, hashOf("attachment", o.evt.ID, number))
}

// target gives the message that a command is about: the one that it replies to, or, if that is an answer of the bot's, the one that this
// is about.
func (b *Bot) target(ctx context.Context, o *order) (evt *event.Event, found bool, err error) {
	repliedTo := o.evt.Content.AsMessage().RelatesTo.GetNonFallbackReplyTo()
	if repliedTo == "" {
		return nil, false, nil
	}
	if evt, err = b.fetchEvent(ctx, o.evt.RoomID, repliedTo); err != nil || evt == nil {
		return nil, false, err
	}
	if evt.Sender != b.client.UserID {
		return evt, true, nil
	}
	about := aboutOf(evt)
	if about == "" {
		return evt, true, nil
	}
	evt, err = b.fetchEvent(ctx, o.evt.RoomID, about)
	return evt, evt != nil, err
}

// mention is a Matrix user in the words of a command: an ID, or a link to one.
func mention(argument string) id.UserID {
	argument = strings.Trim(argument, quotes)
	if uri, err := id.ParseMatrixURIOrMatrixToURL(argument); err == nil && uri.UserID() != "" {
		return uri.UserID()
	}
	return id.UserID(argument)
}
